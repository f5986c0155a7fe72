"""Guessing ahead in the step loop, with a real tiny model: the answer is the same with guesses and without."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nimbos.engine import llama
from nimbos.engine.calibrate import StepTime
from nimbos.engine.grammar import GrammarFactory
from nimbos.engine.llama import Library
from nimbos.engine.loop import Loop
from nimbos.engine.model import Model, ModelOptions, Rows
from nimbos.engine.protocol import FromEngine, Produced, Submit
from nimbos.engine.scheduler import Job, Rules
from nimbos.errors import AnswerFailed
from nimbos.types import Ask, AskClass, Final, Grammar, Sampling, Thinking, TokenChunk, Usage, new_id
from tests import tiny_gguf

GREEDY = Sampling(temperature=0.0)
DRONING = Sampling(temperature=0.0, logit_bias={30: 50.0})  # the same token again and again
PATTERN = [*range(20, 60)]
PROMPT = tuple(PATTERN * 3)


class Steady(StepTime):
    """A machine on which a row costs little, whatever this one does."""

    def predict(self, rows: int, cells: int) -> float:
        return 10.0 + 0.05 * rows

    def observe(self, rows: int, cells: int, milliseconds: float) -> None:
        pass


@dataclass
class Told:
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    reasons: list[str] = field(default_factory=list)


class Bench:
    def __init__(self, model: Model, *, guess_tokens: int) -> None:
        model.clear()
        self.told: dict[str, Told] = {}
        self.failed: list[str] = []
        self._grammars = GrammarFactory(model.vocab)
        self.loop = Loop(
            model, Steady(StepTime.prior(weight_bytes=1, kv_bytes_per_token=1).table), Rules(max_rows=128),
            post=self._post, hold=self._hold, share=model.shares_prefixes, context_limit=480,
            guess_tokens=guess_tokens,
        )  # fmt: skip

    def submit(self, wanted: Ask, prompt: Sequence[int] = PROMPT) -> Told:
        matcher = self._grammars.compile(wanted.grammar) if wanted.grammar is not None else None
        self.told[wanted.id] = told = Told()
        self.loop.submit(Submit(ask=wanted), tuple(prompt), matcher)
        return told

    def run(self, *, until: Callable[[], bool] = lambda: False) -> None:
        while not until() and self.loop.step(lambda: None):
            self.loop.check()
            self.check_memory()

    def check_memory(self) -> None:
        """No guess that was wrong is left in memory."""
        tree, model = self.loop.tree, self.loop.model
        for branch in tree._tips:
            assert model.position_end(branch) == tree.length(branch)

    def _post(self, message: FromEngine) -> None:
        if not isinstance(message, Produced):
            return
        for ask_id, chunk in message.chunks:
            told = self.told[ask_id]
            if isinstance(chunk, TokenChunk):
                told.ids.setdefault(chunk.branch, []).extend(chunk.ids)
                told.text[chunk.branch] = told.text.get(chunk.branch, "") + chunk.text
                told.logprobs += [token.logprob for each in chunk.logprobs or () for token in (each.chosen, *each.top)]
            elif isinstance(chunk, Final):
                told.usage = told.usage + chunk.usage
                told.reasons.append(chunk.reason.value)

    @contextmanager
    def _hold(self, ask_class: AskClass, *, interruptible: bool) -> Iterator[None]:
        yield


def ask(**fields: Any) -> Ask:
    given = {"account": "a", "sampling": GREEDY, "limit_tokens": 80, "ask_class": AskClass.BATCH, **fields}
    return Ask(id=new_id("ask"), model="tiny", **given)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    options = ModelOptions(cells=1024, sequences=16, threads=1, step_tokens=128)
    made = Model(Library(llama.wheel_library()), tiny_gguf.write("qwen2", tmp_path_factory.mktemp("model")), options)
    made.open_context()
    yield made
    made.close()


def both(model: Model, **fields: Any) -> tuple[Bench, Bench]:
    """The same ask, without guesses and with."""
    found: list[Bench] = []
    for guess_tokens in (0, 15):
        bench = Bench(model, guess_tokens=guess_tokens)
        bench.submit(ask(**fields))
        bench.run()
        assert bench.loop.idle
        found.append(bench)
    (plain,), (guessed,) = (list(bench.told.values()) for bench in found)
    assert guessed.ids == plain.ids
    assert guessed.text == plain.text
    assert guessed.logprobs == pytest.approx(plain.logprobs, abs=0.05)
    assert guessed.usage == plain.usage
    assert guessed.reasons == plain.reasons
    return found[0], found[1]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling": Sampling(temperature=0.7, seed=3)},
        {"sampling": Sampling(temperature=1.0, seed=4, top_k=20, logprobs=2)},
        {"sampling": Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5)},
        {"n": 3, "sampling": Sampling(temperature=0.5, seed=5)},
        {"sampling": DRONING},
        {"sampling": DRONING, "stop": ("\0never", "x"), "n": 2},
        {"sampling": Sampling(temperature=0.5, seed=6, logit_bias={30: 50.0, 31: 49.0}), "ignore_eos": True},
        {
            "sampling": Sampling(temperature=0.0, repetition_penalty=1.5, logit_bias={30: 9.0, 31: 8.0}),
            "min_tokens": 60,
        },
        {"limit_tokens": 1},
        {"limit_tokens": 2},
        {"limit_tokens": 80, "ignore_eos": True, "min_tokens": 80},
        {"grammar": Grammar(kind="regex", source="([a-d]{2}){8}")},
        {"grammar": Grammar(kind="regex", source="abcabcabc[0-9]abcabcabc[0-9]abcabc")},
    ],
)
def test_an_answer_is_the_same_with_guesses(model: Model, fields: dict[str, Any]) -> None:
    both(model, **fields)


THOUGHT = Thinking(open="<think>", close="</think>", budget_tokens=37, started=True, farewell=" so it is</think>")


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"stop": ("\x1e" * 37,)}, 37),
        ({"limit_tokens": 37}, 37),
        ({"stop_ids": (30,), "min_tokens": 36}, 37),
        ({"thinking": THOUGHT}, 80),
        ({"sampling": Sampling(temperature=0.0, logit_bias={30: 50.0}, logprobs=3), "stop": ("\x1e" * 37,)}, 37),
        ({"grammar": Grammar(kind="regex", source="[\x1e\x1f]{40}abcabc[\x1e\x1f]{30}")}, 76),
    ],
)
def test_what_ends_or_turns_in_the_middle_of_a_guess_does_so_there(
    model: Model, fields: dict[str, Any], tokens: int
) -> None:
    _, guessed = both(model, **{"sampling": DRONING, **fields})
    (told,) = guessed.told.values()
    assert guessed.loop.counters.guessed_right_tokens > 20
    assert len(told.ids[0]) == tokens
    assert told.usage.thinking == (37 if "thinking" in fields else 0)


def test_what_repeats_takes_fewer_steps(model: Model) -> None:
    plain, guessed = both(model, sampling=DRONING, limit_tokens=200)
    counters = guessed.loop.counters
    assert counters.guessed_right_tokens > 150
    assert counters.guessed_tokens >= counters.guessed_right_tokens
    assert counters.steps < plain.loop.counters.steps / 4
    assert plain.loop.counters.guessed_tokens == 0


def test_as_many_guesses_as_the_setting_allows_are_computed_in_one_step(model: Model) -> None:
    plain, guessed = Bench(model, guess_tokens=0), Bench(model, guess_tokens=64)
    told = [bench.submit(ask(sampling=DRONING, limit_tokens=300)) for bench in (plain, guessed)]
    plain.run()
    model.clear()
    rows = [0]
    while guessed.loop.step(lambda: None):
        rows.append(guessed.loop.counters.step_rows)
    assert told[0].ids == told[1].ids
    assert max(after - before for before, after in pairwise(rows[2:])) == 65


def test_an_answer_goes_on_where_it_was_paid_for(model: Model) -> None:
    whole = Bench(model, guess_tokens=0)
    expected = whole.submit(ask(sampling=DRONING))
    whole.run()
    bench = Bench(model, guess_tokens=15)
    wanted = ask(sampling=DRONING, allowance_tokens=5)
    told = bench.submit(wanted)
    for allowance in (5, 20, 21, 50, None):
        bench.loop.extend(wanted.id, allowance_tokens=allowance, last=False)
        bench.run()
        assert len(told.ids[0]) == (allowance or 80)
    assert told.ids == expected.ids
    assert bench.loop.counters.guessed_right_tokens > 0


def test_a_context_that_was_guessed_is_as_good_a_prefix_as_another(model: Model) -> None:
    first = Bench(model, guess_tokens=15)
    told = first.submit(ask(sampling=DRONING))
    first.run()
    assert first.loop.counters.guessed_right_tokens > 0
    longer = (*PROMPT, *told.ids[0][:60])
    second = first.submit(ask(sampling=DRONING, limit_tokens=20), longer)
    first.run()
    assert second.usage.cached == len(longer) - 1
    assert second.ids[0] == told.ids[0][60:80]


def test_whoever_leaves_in_the_middle_leaves_no_guess_behind(model: Model) -> None:
    bench = Bench(model, guess_tokens=15)
    leaving, staying = ask(sampling=DRONING, n=2), ask(sampling=DRONING)
    bench.submit(leaving)
    told = bench.submit(staying, PROMPT[5:])
    bench.run(until=lambda: bench.loop.counters.guessed_tokens > 20)
    assert not bench.loop.idle
    bench.loop.cancel(leaving.id)
    bench.check_memory()
    bench.run()
    assert len(told.ids[0]) == 80
    assert bench.loop.idle


def is_greedy(model: Model, prompt: Sequence[int], ids: Sequence[int], bias: dict[int, float]) -> bool:
    """Whether each token was the likeliest after those before it, or as good as: batch shapes round differently."""
    model.clear()
    step, at = list(prompt), 0
    for token in ids:
        model.decode([Rows(sequence=0, start=at, tokens=step, logits=True)])
        logits = model.logits(1)[0].copy()
        for biased, by in bias.items():
            logits[biased] += by
        if logits[token] < logits.max() - 0.05:
            return False
        at, step = at + len(step), [token]
    return True


def test_many_asks_that_come_and_go_are_answered_as_they_would_be_alone(model: Model) -> None:
    """Few cells, so contexts give way."""
    rng = random.Random(8)
    asks = [
        (ask(account=rng.choice("ab"), limit_tokens=rng.randrange(1, 60), ask_class=rng.choice(list(AskClass)),
             sampling=rng.choice((GREEDY, DRONING))),
         PROMPT[rng.randrange(40) : rng.randrange(60, 120)])
        for _ in range(30)
    ]  # fmt: skip
    bench = Bench(model, guess_tokens=11)
    left = list(asks)
    while left or not bench.loop.idle:
        if left and rng.random() < 0.4:
            bench.submit(*left.pop())
        if bench.told and rng.random() < 0.02:
            bench.loop.cancel(rng.choice(list(bench.told)))
        bench.loop.step(lambda: None)
        bench.loop.check()
        bench.check_memory()
    together = dict(bench.told)
    assert bench.loop.counters.guessed_right_tokens > 0
    whole = [(wanted, prompt) for wanted, prompt in asks if together[wanted.id].reasons]
    assert len(whole) > 20, "the others were cancelled"
    for wanted, prompt in whole:
        assert is_greedy(model, prompt, together[wanted.id].ids[0], wanted.sampling.logit_bias)


def test_a_branch_that_ends_with_another_in_the_middle_of_a_step_leaves_no_guess_in_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(model, guess_tokens=15)
    choose, failed = bench.loop._choose_one, list[Job]()

    def fail(job: Job, *given: Any, **named: Any) -> None:
        if any(other.overhang for other in bench.loop._live if other is not job):
            failed.append(job)
            raise AnswerFailed("It cannot go on.")
        choose(job, *given, **named)

    monkeypatch.setattr(bench.loop, "_choose_one", fail)
    told = bench.submit(ask(sampling=Sampling(temperature=1.0, seed=5, logit_bias={30: 10.0}), n=2, limit_tokens=300))
    bench.run()
    assert len(failed) == 1, "both guessed in one step"
    assert (bench.loop.idle, told.reasons) == (True, [])


def test_a_family_that_cannot_take_back_does_not_guess(tmp_path: Path) -> None:
    options = ModelOptions(cells=1024, sequences=8, threads=1, step_tokens=128)
    recurrent = Model(Library(llama.wheel_library()), tiny_gguf.write("qwen35", tmp_path), options)
    recurrent.open_context()
    try:
        bench = Bench(recurrent, guess_tokens=15)
        bench.submit(ask(ignore_eos=True, limit_tokens=30))
        while bench.loop.step(lambda: None):
            pass
        assert bench.loop.counters.guessed_tokens == 0
    finally:
        recurrent.close()
