"""The step loop by itself, in this process: what may be aborted while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nimbos.engine import llama
from nimbos.engine.calibrate import StepTime
from nimbos.engine.llama import Library
from nimbos.engine.loop import Loop
from nimbos.engine.model import Model, ModelOptions
from nimbos.engine.protocol import FromEngine, Produced, Submit
from nimbos.engine.scheduler import Rules
from nimbos.types import Ask, AskClass, Final, Sampling, new_id
from tests import tiny_gguf


def test_nobody_gives_way_to_an_ask_that_still_would_not_fit(tmp_path: Path) -> None:
    """What an account leaves to others is not enough for another ask of its own, whoever of a lower class stops."""
    posted: list[FromEngine] = []
    options = ModelOptions(cells=512, sequences=8, threads=1, step_tokens=256)
    model = Model(Library(llama.wheel_library()), tiny_gguf.write("qwen2", tmp_path), options)
    model.open_context()
    costs = StepTime.prior(weight_bytes=model.weight_bytes, kv_bytes_per_token=model.kv_bytes_per_token)
    loop = Loop(
        model, costs, Rules(max_rows=256), post=posted.append, hold=lambda _, interruptible: contextlib.nullcontext(),
        share=True, context_limit=512,
    )  # fmt: skip

    def submit(account: str, ask_class: AskClass, prompt: range, limit: int) -> str:
        ask = Ask(
            id=new_id("ask"), account=account, model="m", ask_class=ask_class, limit_tokens=limit, ignore_eos=True,
            sampling=Sampling(temperature=0.0),
        )  # fmt: skip
        loop.submit(Submit(ask=ask), tuple(prompt), None)
        return ask.id

    def ended() -> list[str]:
        told = [chunk for message in posted if isinstance(message, Produced) for chunk in message.chunks]
        return [ask_id for ask_id, chunk in told if isinstance(chunk, Final)]

    try:
        first = submit("a", AskClass.INTERACTIVE, range(7, 207), 150)
        batch = submit("b", AskClass.BATCH, range(30, 90), 20)
        for _ in range(5):
            loop.step(lambda: None)
        assert loop.counts()[1] == {AskClass.INTERACTIVE: 1, AskClass.AGENT: 0, AskClass.BATCH: 1}
        second = submit("a", AskClass.INTERACTIVE, range(100, 140), 150)
        while loop.step(lambda: None):
            loop.check()
        assert ended() == [batch, first, second]
        assert loop.counters.preemptions == 0
    finally:
        model.close()


@pytest.mark.parametrize(
    ("arch", "ask_class", "abortable"),
    [
        ("qwen2", AskClass.BATCH, True),
        ("qwen2", AskClass.INTERACTIVE, False),
        ("gemma3", AskClass.BATCH, True),
        ("qwen35", AskClass.BATCH, False),  # a recurrent state has no tail that could be taken back
    ],
)
def test_only_steps_that_can_be_taken_back_and_are_not_urgent_may_be_aborted(
    arch: str, ask_class: AskClass, abortable: bool, tmp_path: Path
) -> None:
    seen: list[bool] = []
    posted: list[FromEngine] = []

    @contextlib.contextmanager
    def hold(_ask_class: AskClass, *, interruptible: bool) -> Iterator[None]:
        assert interruptible == loop.abortable
        seen.append(loop.abortable)
        yield

    library = Library(llama.wheel_library())
    options = ModelOptions(cells=512, sequences=8, threads=1, step_tokens=64)
    model = Model(library, tiny_gguf.write(arch, tmp_path), options)
    model.open_context()
    costs = StepTime.prior(weight_bytes=model.weight_bytes, kv_bytes_per_token=model.kv_bytes_per_token)
    loop = Loop(
        model, costs, Rules(), post=posted.append, hold=hold, share=model.shares_prefixes, context_limit=512
    )  # fmt: skip
    try:
        ask = Ask(
            id=new_id("ask"), account="a", model="m", ask_class=ask_class, limit_tokens=3,
            sampling=Sampling(temperature=0.0),
        )  # fmt: skip
        loop.submit(Submit(ask=ask), tuple(range(7, 47)), None)
        while loop.step(lambda: None):
            loop.check()
        assert loop.idle
        assert seen
        assert set(seen) == {abortable}
    finally:
        model.close()
