"""What somebody sees of an answer that began before they looked."""

from __future__ import annotations

from typing import Any

import pytest

from nimbos.cli.process_screen import Screen
from nimbos.cli.remote import Told


def delta(text: str, *, at: int, ask: str = "ask_1") -> Told:
    return Told(kind="delta", body={"ask_id": ask, "channel": "text", "text": text, "at": at})


def partial(text: str, ask: str = "ask_1") -> Told:
    return Told(kind="model.partial", body={"body": {"ask_id": ask, "text": text}}, seq=1)


def done(text: str, ask: str = "ask_1") -> Told:
    message = {"role": "assistant", "content": text}
    return Told(kind="model.done", body={"body": {"ask_id": ask, "message": "h"}, "texts": {"h": message}}, seq=3)


def intent(ask: str, continues: str) -> Told:
    return Told(kind="model.intent", body={"body": {"ask_id": ask, "continues": continues}}, seq=2)


@pytest.mark.parametrize(
    "told",
    [
        [delta("one ", at=0), delta("two ", at=4), delta("three", at=8)],
        [delta("two ", at=4), partial("one two "), delta("three", at=8)],  # came late
        [delta("one ", at=0), partial("one two "), delta("two ", at=4), delta("three", at=8)],  # the log was faster
        [delta("one ", at=0), done("one two three"), delta("two three", at=4)],  # also with the end
        [done("one two three"), delta("one two three", at=0)],
        [partial("one two "), intent("ask_2", "ask_1"), delta("three", at=8, ask="ask_2")],  # goes on on another server
    ],
)
def test_each_word_is_shown_once(told: list[Told], capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for one in told:
        screen.show(one)
    shown: Any = capsys.readouterr()
    assert (shown.out + shown.err).split() == ["one", "two", "three"]
