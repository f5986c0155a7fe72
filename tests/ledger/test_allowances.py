"""Budgets of processes: four meters, charged all the way up, given from one's own only, and topped up from outside."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import BudgetExhausted, InvalidRequest, NotFound, Overloaded
from nimbos.ledger import Allowance, Price, Settlement, allowances, budgets_of, family_use, set_prices
from nimbos.ledger.allowances import CallHold
from nimbos.types import Final, Origin, TokenChunk, Usage
from tests import tiny_gguf
from tests.engine.asking import PROMPT
from tests.ledger.books import ACCOUNT, Books
from tests.ledger.shop import Told, an_ask, shop

NUMBERS = itertools.count()
METERS = ("tokens", "cost_micros", "seconds_ms", "calls")


@pytest.fixture
def books(database: Database) -> Books:
    return Books(database)


async def make(books: Books, process: str, parent: str | None = None, **limits: int) -> None:
    await books.run(lambda: allowances.make(process, Allowance(**limits), parent=parent))


async def standing(books: Books, process: str) -> dict[str, tuple[int | None, int, int]]:
    """(limit, reserved, used) by meter."""
    found = await books.budgets_of("process", process)
    return {budget.meter: (budget.limit, budget.reserved, budget.used) for budget in found}


async def reserve(books: Books, process: str, deadline_ms: int = 1000) -> CallHold:
    return await books.run(lambda: allowances.reserve_call(process, deadline_ms=deadline_ms))


async def settle(books: Books, process: str, *, reserved_ms: int, used_ms: int, calls: int = 1) -> None:
    await books.run(lambda: allowances.settle_call(process, reserved_ms=reserved_ms, used_ms=used_ms, calls=calls))


async def test_what_a_process_uses_is_charged_to_all_above_it_with_or_without_a_limit(books: Books) -> None:
    await make(books, "p")
    await make(books, "c", "p", tokens=100, calls=3)
    await make(books, "g", "c")
    asked = await books.reserve(prompt=10, process="g")
    assert asked.allowance_tokens == 64
    assert (await standing(books, "p"))["tokens"] == (None, 74, 0)
    await books.settle(asked.ask_id, Usage(input=10, output=7))
    hold = await reserve(books, "g")
    await settle(books, "g", reserved_ms=hold.deadline_ms, used_ms=250)
    for process, tokens, calls in (("p", None, None), ("c", 100, 3), ("g", None, None)):
        found = await standing(books, process)
        assert found["tokens"] == (tokens, 0, 17)
        assert found["calls"] == (calls, 0, 1)
        assert found["seconds_ms"] == (None, 0, 250)


async def test_calls_at_the_same_time_cannot_spend_the_last_one_twice(books: Books) -> None:
    await make(books, "p", calls=2)
    for child in ("a", "b", "c"):
        await make(books, child, "p")
    assert (await reserve(books, "a")).limited
    held = await asyncio.gather(*(reserve(books, child) for child in ("b", "c")), return_exceptions=True)
    refused = [one for one in held if isinstance(one, Overloaded)]
    assert len(refused) == 1, "one may come back, so nothing is spent yet"
    await settle(books, "a", reserved_ms=1000, used_ms=1)
    await settle(books, "b" if isinstance(held[0], CallHold) else "c", reserved_ms=1000, used_ms=1)
    with pytest.raises(BudgetExhausted) as spent:
        await reserve(books, "a")
    assert (spent.value.meter, spent.value.limit, spent.value.used) == ("calls", 2, 2)
    assert spent.value.owner == "process 'p'"


async def test_a_call_gets_as_much_time_as_is_left(books: Books) -> None:
    await make(books, "p", seconds=3)
    first = await reserve(books, "p", 2_000)
    second = await reserve(books, "p", 60_000)
    assert (first.deadline_ms, second.deadline_ms) == (2_000, 1_000)
    with pytest.raises(Overloaded):
        await reserve(books, "p", 10)
    await settle(books, "p", reserved_ms=2_000, used_ms=500)
    assert (await reserve(books, "p", 60_000)).deadline_ms == 1_500


async def test_seconds_that_answers_took_are_the_same_seconds(books: Books) -> None:
    await make(books, "p", seconds=2)
    first = await books.reserve(process="p")
    assert first.allowance_tokens == 64, "looked at with each slice"
    more = await books.extend(first.ask_id, Usage(input=10, output=40), allowance=64, compute_ms=1_500)
    assert (more.allowance_tokens, more.last) == (128, False)
    over = await books.extend(first.ask_id, Usage(input=10, output=90), allowance=128, compute_ms=2_100)
    assert (over.allowance_tokens, over.last) == (128, True)
    ended = Settlement(ask_id=first.ask_id, usage=Usage(input=10, output=128), outcome="done", compute_ms=2_300)
    await books.run(lambda: books.ledger.settle(ended))
    assert (await standing(books, "p"))["seconds_ms"] == (2_000, 0, 2_300), "the end of a slice is the overshoot"
    with pytest.raises(BudgetExhausted) as spent:
        await reserve(books, "p")
    assert spent.value.meter == "seconds_ms"
    with pytest.raises(BudgetExhausted):
        await books.reserve(process="p")


async def test_a_parent_gives_from_what_it_has_left_and_from_nothing_else(books: Books) -> None:
    await make(books, "p", tokens=100)
    with pytest.raises(InvalidRequest, match="100 tokens left"):
        await make(books, "c", "p", tokens=101)
    assert await standing(books, "c") == {}
    await make(books, "c", "p", tokens=10)
    await books.ask_and_settle(Usage(input=5, output=5), process="c")
    with pytest.raises(BudgetExhausted):
        await books.reserve(process="c", prompt=1)
    with pytest.raises(InvalidRequest, match="90 tokens left"):
        await books.run(lambda: allowances.give("p", "c", Allowance(tokens=91)))
    assert await books.run(lambda: allowances.give("p", "c", Allowance(tokens=90))) == ["c"]
    assert (await standing(books, "p"))["tokens"] == (100, 0, 10), "its own limit is what it was"
    assert (await standing(books, "c"))["tokens"] == (100, 0, 10)
    await make(books, "other")
    for giver, taker in (("other", "c"), ("c", "p"), ("p", "p")):
        with pytest.raises(InvalidRequest, match="one's own"):
            await books.run(partial(allowances.give, giver, taker, Allowance(tokens=1)))
    with pytest.raises(NotFound):
        await books.run(lambda: allowances.give("p", "nobody", Allowance(tokens=1)))


async def test_a_top_up_goes_through_all_above_and_leaves_them_what_they_had(books: Books) -> None:
    await make(books, "p", tokens=100, seconds=1)
    await make(books, "c", "p", tokens=100)
    await make(books, "g", "c")
    await books.ask_and_settle(Usage(input=90, output=10), process="g")
    reached = await books.run(lambda: allowances.top_up("c", Allowance(tokens=50, calls=5)))
    assert reached == ["c", "g"], "those that may go on now"
    assert (await standing(books, "p"))["tokens"] == (150, 0, 100)
    assert (await standing(books, "c"))["tokens"] == (150, 0, 100)
    assert (await standing(books, "g"))["tokens"] == (None, 0, 100)
    assert (await standing(books, "c"))["calls"] == (None, 0, 0), "what has no limit stays without"
    assert (await books.reserve(process="g", prompt=40)).allowance_tokens == 10
    with pytest.raises(NotFound):
        await books.run(lambda: allowances.top_up("nobody", Allowance(tokens=1)))


async def test_calls_left_open_by_a_process_that_is_over_are_settled_as_they_were_reserved(books: Books) -> None:
    await make(books, "p", seconds=100, calls=10)
    await make(books, "c", "p")
    await make(books, "g", "c")
    await reserve(books, "c", 3_000)
    await reserve(books, "g", 5_000)
    await books.run(lambda: allowances.close("c"))
    assert (await standing(books, "p"))["seconds_ms"] == (100_000, 5_000, 3_000)
    assert (await standing(books, "p"))["calls"] == (10, 1, 1)
    assert (await standing(books, "g"))["calls"] == (None, 1, 0), "its child goes on"
    await books.run(lambda: allowances.close("c"))
    assert (await standing(books, "p"))["calls"] == (10, 1, 1), "once"


@pytest.mark.parametrize("wrong", [{"tokens": -1}, {"seconds": 10**13}, {"calls": -5}, {"cost_micros": 2**70}])
async def test_amounts_out_of_bounds_name_their_field(books: Books, wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await books.run(lambda: allowances.make("p", Allowance(**wrong)))
    assert refused.value.param == f"budget.{next(iter(wrong))}"


async def test_the_tree_is_told_from_the_top(books: Books) -> None:
    await make(books, "p")
    await make(books, "b", "p")
    await make(books, "a", "p")
    await make(books, "x", "b")
    nodes = await books.run(lambda: allowances.tree_of("p"))
    assert [(node.process, node.parent, node.depth) for node in nodes] == [
        ("p", None, 0),
        ("a", "p", 1),
        ("b", "p", 1),
        ("x", "b", 2),
    ]
    assert [node.process for node in await books.run(lambda: allowances.tree_of("b"))] == ["b", "x"]
    assert await books.run(lambda: allowances.tree_of("nobody")) == []


class Family(RuleBasedStateMachine):
    """Calls of a family in any order, against sums over all that ever happened."""

    runner: asyncio.Runner
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(self.database)
        self.tag = f"f{next(NUMBERS)}"
        self.parents: dict[str, str | None] = {}
        self.limits: dict[str, dict[str, int | None]] = {}
        self.open: list[tuple[str, int]] = []
        self.used: list[tuple[str, int, int]] = []

    def do(self, work: Any) -> Any:
        return self.runner.run(work)

    def way(self, process: str) -> list[str]:
        found = [process]
        while (above := self.parents[found[-1]]) is not None:
            found.append(above)
        return found

    def sums(self, name: str) -> dict[str, tuple[int, int]]:
        """(reserved, used) by meter."""
        held = [ms for process, ms in self.open if name in self.way(process)]
        done = [(ms, calls) for process, ms, calls in self.used if name in self.way(process)]
        return {
            "seconds_ms": (sum(held), sum(ms for ms, _ in done)),
            "calls": (len(held), sum(calls for _, calls in done)),
        }

    def room(self, process: str, meter: str) -> int | None:
        rooms = [
            limit - sum(self.sums(name)[meter])
            for name in self.way(process)
            if (limit := self.limits[name][meter]) is not None
        ]
        return min(rooms, default=None)

    @initialize(calls=st.one_of(st.none(), st.integers(0, 8)), seconds=st.one_of(st.none(), st.integers(0, 20)))
    def found(self, calls: int | None, seconds: int | None) -> None:
        self.spawn(None, calls, seconds)

    def spawn(self, parent: str | None, calls: int | None, seconds: int | None) -> None:
        name = f"{self.tag}-{len(self.parents)}"
        allowance = Allowance(calls=calls, seconds=seconds)
        self.do(self.books.run(lambda: allowances.make(name, allowance, parent=parent)))
        self.parents[name] = parent
        self.limits[name] = {"calls": calls, "seconds_ms": None if seconds is None else seconds * 1000}

    @rule(
        data=st.data(), calls=st.one_of(st.none(), st.integers(0, 8)), seconds=st.one_of(st.none(), st.integers(0, 9))
    )
    def bear(self, data: st.DataObject, calls: int | None, seconds: int | None) -> None:
        assume(len(self.parents) < 6)
        parent = data.draw(st.sampled_from(sorted(self.parents)))
        wanted = {"calls": calls, "seconds_ms": None if seconds is None else seconds * 1000}
        fits = all(
            amount is None or (room := self.room(parent, meter)) is None or amount <= max(0, room)
            for meter, amount in wanted.items()
        )
        if fits:
            self.spawn(parent, calls, seconds)
        else:
            with pytest.raises(InvalidRequest):
                self.spawn(parent, calls, seconds)

    @rule(data=st.data(), deadline=st.integers(1, 6_000))
    def call(self, data: st.DataObject, deadline: int) -> None:
        process = data.draw(st.sampled_from(sorted(self.parents)))
        rooms = {meter: self.room(process, meter) for meter in ("calls", "seconds_ms")}
        if any(room is not None and room <= 0 for room in rooms.values()):
            with pytest.raises((BudgetExhausted, Overloaded)):
                self.do(reserve(self.books, process, deadline))
            return
        hold = self.do(reserve(self.books, process, deadline))
        left = rooms["seconds_ms"]
        assert hold.deadline_ms == (deadline if left is None else min(deadline, left))
        self.open.append((process, hold.deadline_ms))

    @rule(data=st.data(), share=st.floats(0, 1), calls=st.integers(0, 1))
    def end(self, data: st.DataObject, share: float, calls: int) -> None:
        assume(self.open)
        process, held = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        used = int(held * share)
        self.do(settle(self.books, process, reserved_ms=held, used_ms=used, calls=calls))
        self.used.append((process, used, calls))

    @rule(data=st.data(), calls=st.integers(0, 5))
    def give_more(self, data: st.DataObject, calls: int) -> None:
        process = data.draw(st.sampled_from(sorted(self.parents)))
        self.do(self.books.run(lambda: allowances.top_up(process, Allowance(calls=calls))))
        for name in self.way(process):
            if (limit := self.limits[name]["calls"]) is not None:
                self.limits[name]["calls"] = limit + calls

    @invariant()
    def agrees(self) -> None:
        for name in self.parents:
            found = self.do(self.books.run(partial(budgets_of, "process", name)))
            for budget in found:
                if budget.meter in ("calls", "seconds_ms"):
                    assert (budget.reserved, budget.used) == self.sums(name)[budget.meter]
                    assert budget.limit == self.limits[name][budget.meter]
                    assert budget.limit is None or budget.reserved + budget.used <= budget.limit


@pytest.mark.parametrize("seed", range(1))
def test_a_family_never_spends_more_than_it_was_given(database_settings: Settings, seed: int) -> None:
    with asyncio.Runner() as runner:
        Family.runner = runner
        Family.database = runner.run(Database.open(database_settings))
        try:
            run_state_machine_as_test(
                Family,
                settings=settings(
                    max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
                ),
            )
        finally:
            runner.run(Family.database.close())


async def test_each_of_a_family_is_told_what_it_used_itself(books: Books) -> None:
    await books.run(lambda: set_prices([Price(meter="output", micros_per_million=2_000_000)]))
    await make(books, "p", tokens=500)
    await make(books, "c", "p")
    await make(books, "g", "c")
    await make(books, "stranger")
    await books.ask_and_settle(Usage(input=10, cached=4, output=7, thinking=2, recomputed=3), process="p")
    await books.ask_and_settle(Usage(input=1, output=1), process="g")
    await books.ask_and_settle(Usage(input=1, output=1), process="g")
    await books.ask_and_settle(Usage(input=99, output=99), process="stranger")
    await books.reserve(process="c")
    for process, used_ms in (("g", 40), ("g", 2), ("p", 100)):
        await reserve(books, process)
        await settle(books, process, reserved_ms=1000, used_ms=used_ms)
    p, c, g = await family_use(books.database, "p")
    assert [(use.process, use.parent) for use in (p, c, g)] == [("p", None), ("c", "p"), ("g", "c")]
    kinds = {"input": 6, "cached": 4, "output": 5, "thinking": 2, "recomputed": 3}
    assert p.used == {**kinds, "asks": 1, "cost_micros": 14, "calls": 1, "seconds_ms": 100}
    assert c.used == {}, "what is not settled is not told"
    assert g.used == {"input": 2, "output": 2, "asks": 2, "cost_micros": 4, "calls": 2, "seconds_ms": 42}
    assert (p.budgets["tokens"].limit, p.budgets["tokens"].used) == (500, 17 + 4)
    assert p.budgets["calls"].used == 3
    assert await family_use(books.database, "nobody") == []


async def test_an_answer_ends_when_the_seconds_are_over(
    database: Database, database_settings: Settings, tmp_path: Path
) -> None:
    """Of a real engine, whose computing is counted as it computes."""
    model = tiny_gguf.write("qwen2", tmp_path)
    async with shop(database, Path(database_settings.home) / "shop", models=(model,)) as place:
        books = place.books
        await make(books, "p", seconds=1)
        await reserve(books, "p", 1000)
        await settle(books, "p", reserved_ms=1000, used_ms=980)
        told = Told(an_ask(PROMPT, model=model.stem, limit_tokens=1_900, ignore_eos=True))
        chunks = place.service.generate(ACCOUNT, told.ask, origin=Origin(process="p"))
        async with aclosing(chunks):
            async for chunk in chunks:
                if isinstance(chunk, TokenChunk):
                    told.output += len(chunk.ids)
                elif isinstance(chunk, Final):
                    told.finals.append(chunk)
        assert [final.budget_ended for final in told.finals] == [True]
        assert 0 < told.output < 1_900
        limit, reserved, used = (await standing(books, "p"))["seconds_ms"]
        assert (limit, reserved) == (1_000, 0)
        assert used >= 1_000
        rows = await place.rows()
        assert rows[told.ask.id]["compute_ms"] == used - 980
        with pytest.raises(BudgetExhausted):
            await anext(place.service.generate(ACCOUNT, an_ask(model=model.stem), origin=Origin(process="p")))
