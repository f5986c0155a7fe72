"""The kill matrix: whatever write a server dies or fails at, a run ends as if nothing had been.

`matrix/scenarios.py` says what runs, `matrix/doom.py` how it dies, `matrix/house.py` who goes on. Of each end it must
hold: the final folds are those of an undisturbed run, no effect happened that must not, none is missing, and ledger,
log and undisturbed run agree about every token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.databases import postgres_server
from tests.kernel.matrix.doom import Deed
from tests.kernel.matrix.house import House
from tests.kernel.matrix.outcome import Outcome, effects_of, outcome_of, world_is_wrong
from tests.kernel.matrix.scenarios import SCENARIOS, Scenario

COMMITS_MAX = 1_000
SQLITE_DEEDS: tuple[Deed, ...] = ("kill", "power", "full", "locked", "io")
POSTGRESQL_DEEDS: tuple[Deed, ...] = ("kill", "gone")


@dataclass
class Matrix:
    """One house, where scenarios run again and again."""

    house: House

    def __post_init__(self) -> None:
        self.house.start()
        self.house.install()
        self.undisturbed: dict[str, tuple[Outcome, list[list[str]]]] = {}

    def learn(self, scenario: Scenario) -> None:
        """What comes of it when nothing happens."""
        outcome, effects, wrong = self._run(scenario, "undisturbed")
        assert (outcome.broken, wrong) == ((), [])
        self.undisturbed[scenario.name] = outcome, effects

    def strike(self, scenario: Scenario, deed: Deed, at: int) -> bool:
        """False: the run was over before."""
        self.house.arm(at, deed)
        outcome, effects, wrong = self._run(scenario, f"{deed} at {at}")
        expected, expected_effects = self.undisturbed[scenario.name]
        assert wrong == [], (deed, at)
        assert outcome.broken == (), (deed, at)
        assert outcome.processes == expected.processes, (deed, at)
        assert effects == expected_effects, (deed, at)
        if deed != "power":  # then the counters are lost, and what was reserved is taken for used
            assert outcome.tokens == expected.tokens, (deed, at)
        return self.house.struck.exists()

    def _run(self, scenario: Scenario, key: str) -> tuple[Outcome, list[list[str]], list[str]]:
        pids = self.house.run(scenario, f"{scenario.name} {key}")
        outcome = asyncio.run(outcome_of(self.house.home, self.house.url, pids))
        done = [one for one in self.house.world.done() if one[0] in pids]
        return outcome, effects_of(done, pids), world_is_wrong(done, pids)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    house = House(tmp_path_factory.mktemp("house"))
    try:
        yield Matrix(house)
    finally:
        house.close()


@pytest.mark.parametrize(
    ("name", "deed", "at"),
    [
        ("agent", "kill", 24),
        ("agent", "full", 31),
        ("function", "kill", 17),
        ("fork", "kill", 30),
    ],
)
def test_a_run_ends_as_if_nothing_had_been(matrix: Matrix, name: str, deed: Deed, at: int) -> None:
    if name not in matrix.undisturbed:
        matrix.learn(SCENARIOS[name])
    assert matrix.strike(SCENARIOS[name], deed, at)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("deed", SQLITE_DEEDS)
def test_whatever_write_it_is_on_sqlite(tmp_path: Path, name: str, deed: Deed) -> None:
    every_write(House(tmp_path), SCENARIOS[name], deed)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("deed", POSTGRESQL_DEEDS)
def test_whatever_write_it_is_on_postgresql(tmp_path: Path, name: str, deed: Deed) -> None:
    every_write(House(tmp_path, postgres_server().with_tables()), SCENARIOS[name], deed)


def every_write(house: House, scenario: Scenario, deed: Deed) -> None:
    """Write 1, 2, 3 … until the run is over before. Whoever dies in the middle of an opaque effect must have asked."""
    try:
        matrix = Matrix(house)
        matrix.learn(scenario)
        at = next(at for at in count(1) if not matrix.strike(scenario, deed, at))
        assert 10 < at < COMMITS_MAX
        assert (house.doubts > 0) == (scenario.mails and deed != "gone")  # which is tried again unseen
    finally:
        house.close()
