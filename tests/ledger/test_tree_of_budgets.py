"""The tree of budgets under any sequence of asks, against a reference that adds up everything from the beginning.

The reference knows no rows, no slices already moved and no totals: after each step it computes what every budget must
say from the list of all asks, and what an ask must be granted by trying every slice from the largest down.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nimbos.config import Settings
from nimbos.db import Database, Transaction
from nimbos.errors import BudgetExhausted
from nimbos.ledger import Budget, Price, find_budget, set_prices
from nimbos.ledger.budgets import Held
from nimbos.ledger.prices import Rates, tokens_of
from nimbos.types import Account, Usage
from tests.ledger.books import Books, an_ask

T = TypeVar("T")
RATES = Rates(input=1_300_000, cached=200_000, output=2_700_000, thinking=2_100_000)
PRICES = [Price(meter=name, micros_per_million=RATES.of(name)) for name in ("input", "cached", "output", "thinking")]
NUMBERS = itertools.count()
KEYS = ("k0", "k1", "k2", "k3")  # the first two of project p0, the others of p1
PROJECT = {"k0": "p0", "k1": "p0", "k2": "p1", "k3": "p1"}
PROCESSES = ("", "child", "grandchild")


@dataclass
class Node:
    """A budget: `ids` are those of the owners whose asks it is charged."""

    id: str
    name: str
    meter: str
    limit: int | None
    parent: str | None = None


@dataclass
class Open:
    """An ask: what is granted, what the engine made of it, and what the ledger was told of that."""

    id: str
    chain: list[Node]
    prompt: int
    allowance: int | None
    outputs: list[int]
    read: int = 0
    told: Usage = field(default_factory=Usage)
    ended: set[int] = field(default_factory=set)

    def usage(self) -> Usage:
        output = sum(self.outputs)
        return Usage(input=self.read, cached=self.read // 3, output=output, thinking=output // 4)

    def cost(self, meter: str, usage: Usage) -> int:
        return tokens_of(usage) if meter == "tokens" else RATES.cost_micros(usage)

    def hold(self, meter: str) -> int:
        """What may still come beyond what was told."""
        if self.allowance is None:
            return 0
        most = sum(out if branch in self.ended else self.allowance for branch, out in enumerate(self.outputs))
        prompt, output = self.prompt - self.told.input, most - self.told.output
        return prompt + output if meter == "tokens" else RATES.bound_micros(prompt_tokens=prompt, output_tokens=output)


class TreeOfBudgets(RuleBasedStateMachine):
    """`runner` and `database` are the test's."""

    runner: asyncio.Runner
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(self.database)
        self.tag = str(next(NUMBERS))
        self.open: list[Open] = []
        self.settled: list[tuple[list[Node], Usage]] = []
        self.nodes: list[Node] = []
        self.last_over: dict[str, int] = {}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def node(self, name: str, meter: str, limit: int | None, parent: str | None = None) -> Node:
        kind = {"o": "organisation", "p": "project", "k": "key", "c": "process", "g": "process"}[name[0]]
        made = self.do(
            self.books.budget(kind, f"{name}-{self.tag}", meter=meter, period="total", limit=limit, parent=parent)
        )
        return Node(id=made.id, name=name, meter=meter, limit=limit, parent=parent)

    @precondition(lambda self: not self.nodes)
    @rule(
        limits=st.lists(st.one_of(st.none(), st.integers(0, 900)), min_size=7, max_size=7),
        meters=st.lists(st.sampled_from(["tokens", "cost_micros"]), min_size=4, max_size=4),
    )
    def plant(self, limits: list[int | None], meters: list[str]) -> None:
        organisation, project, key, process = meters
        self.nodes = [
            self.node("o", organisation, limits[0]),
            self.node("p0", project, limits[1]),
            self.node("p1", "tokens", limits[2]),
            self.node("k0", key, limits[3]),
            self.node("k1", "cost_micros", limits[4]),
            self.node("k2", "tokens", limits[5]),
        ]
        child = self.node("child", process, limits[6])
        self.nodes += [child, self.node("grandchild", "tokens", limits[4], parent=child.id)]

    @precondition(lambda self: self.nodes)
    @rule(
        key=st.sampled_from(KEYS),
        process=st.sampled_from(PROCESSES),
        prompt=st.integers(1, 120),
        n=st.integers(1, 3),
        limit=st.one_of(st.none(), st.integers(1, 100)),
    )
    def reserve(self, key: str, process: str, prompt: int, n: int, limit: int | None) -> None:
        names = {"o", PROJECT[key], key, process} | ({"child"} if process == "grandchild" else set())
        chain = [node for node in self.nodes if node.name in names]
        ask = an_ask(n=n, limit_tokens=limit)
        account = Account(
            id=f"{PROJECT[key]}-{self.tag}",
            name="",
            organisation=f"o-{self.tag}",
            key=f"{key}-{self.tag}",
            key_name="",
            user="",
        )
        wanted = 64 if limit is None else min(64, limit)
        fits = [slice_ for slice_ in range(wanted, 0, -1) if self.fits(chain, prompt, n * slice_, others=True)]
        alone = self.fits(chain, prompt, n, others=False)
        origin = f"{process}-{self.tag}" if process else ""
        try:
            reserved = self.do(self.books.reserve(ask, prompt=prompt, account=account, process=origin))
        except BudgetExhausted:
            assert not alone
            return
        except Held:
            assert alone and not fits
            return
        limited = any(node.limit is not None for node in chain)
        assert reserved.allowance_tokens == (fits[0] if limited else None)
        self.open.append(Open(ask.id, chain, prompt, reserved.allowance_tokens, [0] * n))

    def fits(self, chain: list[Node], prompt: int, output: int, *, others: bool) -> bool:
        for node in chain:
            if node.limit is None:
                continue
            used, reserved = self.truth(node)
            need = prompt + output
            if node.meter == "cost_micros":
                need = RATES.bound_micros(prompt_tokens=prompt, output_tokens=output)
            if used + (reserved if others else 0) + need > node.limit:
                return False
        return True

    def truth(self, node: Node) -> tuple[int, int]:
        """(used, reserved), from all asks there ever were."""
        used = sum(
            tokens_of(usage) if node.meter == "tokens" else RATES.cost_micros(usage)
            for chain, usage in self.settled
            if node in chain
        )
        of_open = [ask for ask in self.open if node in ask.chain]
        used += sum(ask.cost(node.meter, ask.told) for ask in of_open)
        return used, sum(ask.hold(node.meter) for ask in of_open)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), reads=st.integers(0, 120), makes=st.lists(st.integers(0, 80), max_size=3))
    def compute(self, which: int, reads: int, makes: list[int]) -> None:
        """The engine goes on, within what is paid for."""
        ask = self.open[which % len(self.open)]
        ask.read = min(ask.prompt, ask.read + reads)
        for branch, more in enumerate(makes[: len(ask.outputs)]):
            if branch not in ask.ended:
                allowed = 10**6 if ask.allowance is None else ask.allowance
                ask.outputs[branch] = min(allowed, ask.outputs[branch] + more)

    @precondition(lambda self: any(ask.allowance is not None for ask in self.open))
    @rule(which=st.integers(0, 100), ends=st.booleans())
    def extend(self, which: int, ends: bool) -> None:
        asks = [ask for ask in self.open if ask.allowance is not None]
        ask = asks[which % len(asks)]
        if ends and len(ask.outputs) - len(ask.ended) > 1:
            ask.ended.add(min(set(range(len(ask.outputs))) - ask.ended))
        assert ask.allowance is not None
        live = len(ask.outputs) - len(ask.ended)
        usage = ask.usage()
        extended = self.do(
            self.books.extend(
                ask.id,
                usage,
                allowance=ask.allowance,
                live=live,
                ended_output=sum(ask.outputs[branch] for branch in ask.ended),
            )
        )
        ask.told = usage
        more = [size for size in range(64, 0, -1) if self.fits_more(ask, live * size, others=True)]
        if more:
            assert extended.allowance_tokens == ask.allowance + more[0]
            ask.allowance += more[0]
        else:
            assert extended.allowance_tokens == ask.allowance
            assert (extended.wait, extended.last) == (
                (True, False) if self.fits_more(ask, live, others=False) else (False, True)
            )

    def fits_more(self, ask: Open, output: int, *, others: bool) -> bool:
        for node in ask.chain:
            if node.limit is None:
                continue
            used, reserved = self.truth(node)
            own = ask.hold(node.meter)
            rest = (ask.prompt - ask.told.input, ask.hold("tokens") - (ask.prompt - ask.told.input) + output)
            need = sum(rest)
            if node.meter == "cost_micros":
                need = RATES.bound_micros(prompt_tokens=rest[0], output_tokens=rest[1])
            if used + (reserved - own if others else 0) + need > node.limit:
                return False
        return True

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), twice=st.booleans())
    def settle(self, which: int, twice: bool) -> None:
        ask = self.open.pop(which % len(self.open))
        settled = self.do(self.books.settle(ask.id, ask.usage()))
        assert settled.new
        assert settled.cost_micros == RATES.cost_micros(ask.usage())
        if twice:
            assert not self.do(self.books.settle(ask.id, Usage(input=10**6))).new
        self.settled.append((ask.chain, ask.usage()))

    @precondition(lambda self: self.nodes)
    @rule(which=st.integers(0, 100), limit=st.integers(0, 900))
    def change(self, which: int, limit: int) -> None:
        node = self.nodes[which % len(self.nodes)]
        assume(node.limit is not None)  # who was let in without any limit is not held by a later one
        kind = {"o": "organisation", "p": "project", "k": "key", "c": "process", "g": "process"}[node.name[0]]
        self.do(self.books.budget(kind, f"{node.name}-{self.tag}", meter=node.meter, period="total", limit=limit))
        node.limit = limit

    @invariant()
    def check(self) -> None:
        found = self.do(self.books.run(self.found))
        for node in self.nodes:
            budget = found[node.id]
            assert (budget.used, budget.reserved) == self.truth(node), node.name  # nothing lost, nothing twice
            self.never_over(node, budget.used + budget.reserved)
            children = [found[child.id] for child in self.children(node)]
            assert sum(child.used for child in children) <= budget.used
            assert sum(child.reserved for child in children) <= budget.reserved or node.limit is None

    def found(self) -> Transaction[dict[str, Budget]]:
        """All in one transaction: they are looked at after each step."""
        budgets = {}
        for node in self.nodes:
            budgets[node.id] = yield from find_budget(node.id)
        return budgets

    def never_over(self, node: Node, committed: int) -> None:
        """Beyond its limit it may only be by what was there when the limit was lowered, and that only shrinks (but
        for the rounding of an ask's cost, at most a millionth each)."""
        if node.limit is not None and committed > node.limit:
            assert committed <= self.last_over.get(node.id, committed) + len(self.open) + 1
        self.last_over[node.id] = max(committed, node.limit or 0)

    def children(self, node: Node) -> Iterator[Node]:
        below = {"o": ("p0", "p1"), "p0": ("k0", "k1"), "p1": ("k2",), "child": ("grandchild",)}.get(node.name, ())
        return (child for child in self.nodes if child.name in below and child.meter == node.meter)

    def teardown(self) -> None:
        for ask in self.open:
            self.do(self.books.settle(ask.id, ask.usage()))
        self.settled += [(ask.chain, ask.usage()) for ask in self.open]
        self.open = []
        found = self.do(self.books.run(self.found))
        for node in self.nodes:
            budget = found[node.id]
            assert (budget.used, budget.reserved) == self.truth(node)
            assert budget.reserved == 0


@pytest.mark.parametrize("examples", [pytest.param(25), pytest.param(400, marks=pytest.mark.long)])
def test_the_tree_of_budgets_is_what_adding_up_everything_says(database_settings: Settings, examples: int) -> None:
    with asyncio.Runner() as runner:
        TreeOfBudgets.runner = runner
        TreeOfBudgets.database = runner.run(Database.open(database_settings))
        try:
            runner.run(Books(TreeOfBudgets.database).run(lambda: set_prices(PRICES)))
            run_state_machine_as_test(
                TreeOfBudgets,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=40,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(TreeOfBudgets.database.close())
