"""Preparing prompts: an account that brings many does not hold up another that brings one."""

from __future__ import annotations

import threading

from nimbos.engine.turns import Turns


def test_accounts_take_turns_and_each_is_served_in_order() -> None:
    turns: Turns[str] = Turns()
    for number in range(5):
        turns.put("flood", f"flood {number}")
    turns.put("polite", "polite 0")
    turns.put("other", "other 0")
    turns.put("polite", "polite 1")
    order = [turns.get() for _ in range(8)]
    assert order == [
        "flood 0", "polite 0", "other 0", "flood 1", "polite 1", "flood 2", "flood 3", "flood 4",
    ]  # fmt: skip


def test_one_who_comes_back_waits_behind_those_who_are_there() -> None:
    turns: Turns[int] = Turns()
    turns.put("a", 1)
    assert turns.get() == 1
    turns.put("b", 2)
    turns.put("a", 3)
    assert [turns.get(), turns.get()] == [2, 3]


def test_a_waiting_thread_gets_what_arrives() -> None:
    turns: Turns[int] = Turns()
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(turns.get()))
    thread.start()
    turns.put("a", 7)
    thread.join(60)
    assert got == [7]
