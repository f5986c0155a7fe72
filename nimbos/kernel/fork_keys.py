"""What forks were asked for with, so that who asks again, as an answer was lost, gets the same forks and no others.

A key holds within the process that is forked. It stands with each fork where a spawn's stands, so that of two that ask
at once one alone can make them. No key from outside has a line break, and a child's begins otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Text, bindparam, func, select

from nimbos.db import Bound, Row, Statement
from nimbos.db.tables.processes import processes
from nimbos.errors import Conflict

_START = bindparam("start", type_=Text)
_MADE = Statement(
    select(processes.c.id, processes.c.spawn_key).where(
        processes.c.forked_from == bindparam("pid", type_=Text),
        func.substr(processes.c.spawn_key, 1, func.length(_START)) == _START,
    )
)


class MadeBefore(Exception):
    """Ends a transaction that would make them again. Never leaves `forks.py`."""

    def __init__(self, pids: Sequence[str]) -> None:
        super().__init__(len(pids))
        self.pids = list(pids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkKey:
    """`word`: of whoever asks; "" for none. `at`, `n`: as they are asked for."""

    pid: str
    word: str
    at: int | None
    n: int

    def of(self, number: int) -> str:
        """The spawn key of one of the forks, from 0; "" without a key."""
        return f"{self._start}{self._asked}\n{number}" if self.word else ""

    def looking(self) -> Bound:
        """For `made`."""
        return _MADE(pid=self.pid, start=self._start)

    def made(self, rows: Sequence[Row]) -> list[str]:
        """The forks that were made with it, in their order; none yet. Raises: Conflict when others were asked for."""
        found = dict[int, str]()
        for row in rows:
            asked, _, number = row["spawn_key"].removeprefix(self._start).rpartition("\n")
            if asked != self._asked:
                raise Conflict(
                    f"With this key other forks of {self.pid} were asked for. Take another key, or ask for the same.",
                    param="key",
                )
            found[int(number)] = row["id"]
        return [found[number] for number in sorted(found)]

    @property
    def _start(self) -> str:
        return f"fork\n{self.pid}\n{self.word}\n"

    @property
    def _asked(self) -> str:
        return f"{'' if self.at is None else self.at}\n{self.n}"
