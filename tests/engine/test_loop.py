"""The step loop by itself, in this process: who gives way to whom for cells, and what may be aborted while it
computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nimbos.engine import llama
from nimbos.engine.calibrate import StepTime
from nimbos.engine.llama import Library
from nimbos.engine.loop import Loop
from nimbos.engine.model import Model, ModelOptions, Rows
from nimbos.engine.protocol import FromEngine, Produced, Submit
from nimbos.engine.scheduler import Rules
from nimbos.types import Ask, AskClass, Final, Sampling, new_id
from tests import tiny_gguf

CELLS = 512


class Place:
    """A loop, stepped by hand; prompts are ranges of token ids."""

    def __init__(self, model: Model) -> None:
        self.posted: list[FromEngine] = []
        costs = StepTime.prior(weight_bytes=model.weight_bytes, kv_bytes_per_token=model.kv_bytes_per_token)
        self.loop = Loop(
            model, costs, Rules(max_rows=256), post=self.posted.append, share=True, context_limit=CELLS,
            hold=lambda _, interruptible: contextlib.nullcontext(),
        )  # fmt: skip

    def submit(
        self, account: str, ask_class: AskClass, prompt: Sequence[int], limit: int, *, pin_s: float = 0.0
    ) -> str:
        """`pin_s`: of the whole prompt."""
        ask = Ask(
            id=new_id("ask"), account=account, model="m", ask_class=ask_class, limit_tokens=limit, ignore_eos=True,
            sampling=Sampling(temperature=0.0), pin_s=pin_s, pin_tokens=len(prompt),
        )  # fmt: skip
        self.loop.submit(Submit(ask=ask), tuple(prompt), None)
        return ask.id

    def steps(self, most: int = 1_000) -> None:
        """So many, or to the end."""
        for _ in range(most):
            if not self.loop.step(lambda: None):
                return
            self.loop.check()
        assert most < 1_000, "it never ends"

    @property
    def ended(self) -> list[str]:
        told = [chunk for message in self.posted if isinstance(message, Produced) for chunk in message.chunks]
        return [ask_id for ask_id, chunk in told if isinstance(chunk, Final)]

    @property
    def live(self) -> tuple[int, ...]:
        return tuple(self.loop.counts()[1].values())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    options = ModelOptions(cells=CELLS, sequences=8, threads=1, step_tokens=256)
    model = Model(Library(llama.wheel_library()), tiny_gguf.write("qwen2", tmp_path), options)
    model.open_context()
    yield Place(model)
    model.close()


@pytest.mark.parametrize("places", [64, 2])
def test_nobody_gives_way_to_an_ask_that_still_would_not_fit(place: Place, places: int) -> None:
    """What an account leaves to others is not enough for another ask of its own, whoever of a lower class stops; also
    when one would have to stop for its place alone."""
    place.loop.rules = Rules(max_rows=256, live_jobs=places)
    first = place.submit("a", AskClass.INTERACTIVE, range(7, 207), 150)
    batch = place.submit("b", AskClass.BATCH, range(30, 90), 20)
    place.steps(5)
    assert place.live == (1, 0, 1)
    second = place.submit("a", AskClass.INTERACTIVE, range(100, 140), 150)
    place.steps()
    assert place.ended == [batch, first, second]
    assert place.loop.counters.preemptions == 0


@pytest.mark.parametrize(("too_many", "gives_way"), [(0, 1), (1, 0)])
def test_what_is_pinned_is_not_promised_to_whom_others_would_give_way(
    place: Place, too_many: int, gives_way: int
) -> None:
    """To the very cell. One that does not fit beside the pins and its own class has its turn when those are done."""
    pinned, own, first_limit, limit = 200, 100, 40, 20
    place.submit("p", AskClass.INTERACTIVE, range(7, 7 + pinned), 1, pin_s=300.0)
    place.steps()
    assert place.loop.tree.pinned_cells == place.loop.tree.used_cells == pinned
    first = place.submit("a", AskClass.INTERACTIVE, range(50, 50 + own), first_limit)
    batch = place.submit("b", AskClass.BATCH, range(30, 90), first_limit // 2)
    place.steps(5)
    assert place.live == (1, 0, 1)
    left = CELLS - pinned - own - first_limit
    second = place.submit("c", AskClass.INTERACTIVE, range(9, 9 + left - limit + too_many), limit)
    place.steps(1)
    assert place.live == (1 + gives_way, 0, 1 - gives_way)
    assert place.loop.counters.preemptions == gives_way
    assert place.loop.tree.pinned_cells == pinned
    place.steps()
    assert set(place.ended[1:]) == {first, batch, second}
    assert place.loop.counters.preemptions == gives_way
    assert place.loop.tree.pinned_cells == pinned


def test_a_prefix_that_is_shared_counts_once_when_room_is_looked_for(place: Place) -> None:
    """Branches of one prefix are let in, and batch work gives way to them, though each of their contexts is long."""
    prefix = tuple(range(7, 207))
    for number in range(3):
        place.submit("a", AskClass.INTERACTIVE, (*prefix, *range(number, number + 10)), 20)
    place.submit("b", AskClass.BATCH, range(30, 130), 20)
    while place.live != (3, 0, 1):
        place.steps(1)
    place.submit("a", AskClass.INTERACTIVE, (*prefix, *range(100, 110)), 60)
    place.steps(1)
    assert place.live == (4, 0, 0)
    place.steps()
    assert len(place.ended) == 5


def test_a_pin_whose_time_is_over_costs_nobody_a_cell(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody waits: what runs needs the room."""
    now = 1_000.0
    monkeypatch.setattr("nimbos.engine.loop._now_ms", lambda: now)
    place.submit("p", AskClass.INTERACTIVE, range(7, 207), 1, pin_s=60.0)
    place.steps()
    long = [place.submit(account, AskClass.INTERACTIVE, range(30, 50), 150) for account in ("a", "b")]
    place.steps(5)
    assert place.live == (2, 0, 0)
    now += 60_000.0
    place.steps()
    assert sorted(place.ended[1:]) == sorted(long)
    assert (place.loop.tree.pinned_cells, place.loop.counters.preemptions) == (0, 0)


def test_no_ask_keeps_cells_for_longer_than_an_hour(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr("nimbos.engine.loop._now_ms", lambda: now)
    place.submit("p", AskClass.INTERACTIVE, range(7, 207), 1, pin_s=1e9)
    place.steps()
    now += 3_599_000.0
    place.steps()
    assert place.loop.tree.pinned_cells == 200
    now += 2_000.0
    place.steps()
    assert place.loop.tree.pinned_cells == 0


def test_a_prompt_that_was_whole_when_its_step_was_stopped_still_gets_its_answer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last token is computed again: there are no logits of a step that was stopped."""
    decode = place.loop.model.decode
    stopped: list[int] = []

    def stop_once(rows: Sequence[Rows]) -> int:
        if stopped or len(rows) < 2:
            return decode(rows)
        stopped.append(len(rows))
        decode(rows[:1])
        return llama.ABORTED

    monkeypatch.setattr(place.loop.model, "decode", stop_once)
    asks = [place.submit(account, AskClass.BATCH, range(7, 47), 4) for account in ("a", "b")]
    place.steps()
    assert stopped == [2]
    assert sorted(place.ended) == sorted(asks)


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
