"""What a batch needs of a route: to perform one body without HTTP, and to write an error in the route's own shape.

The routes are in `api`, a layer above; it hands its endpoints to `Batches.serve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nimbos.errors import NimbosError
from nimbos.ledger import Journal
from nimbos.types import Account, Origin


@dataclass(frozen=True, slots=True)
class Reply:
    """What the route would have answered. `ask_id`: of the ask behind it, "" where there was none."""

    status: int
    body: bytes
    ask_id: str = ""


class AnswerJournal(Journal, Protocol):
    """A journal that can be told the whole answer before its ask is settled, and writes both in one transaction."""

    def answered(self, reply: Reply) -> None: ...

    def of(self, number: int) -> Journal:
        """The journal of one ask among several behind the answer; `self` is that of the first."""
        ...


class Perform(Protocol):
    async def __call__(
        self, account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None
    ) -> Reply:
        """`journal`: for the one ask behind the body, where there is one; a route may leave it out.

        Raises: NimbosError for everything that is no answer: whoever called decides whether to try again, and
        writes what remains in the route's shape."""
        ...


class Refuse(Protocol):
    def __call__(self, error: NimbosError) -> bytes:
        """The error's body, as the route would have written it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`path`: as lines name it, "/v1/chat/completions"."""

    path: str
    perform: Perform
    refuse: Refuse
