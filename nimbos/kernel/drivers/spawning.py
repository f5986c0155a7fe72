"""`spawn`: a child whose head, log, budget and work are rows of the same transaction as the call that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nimbos.db import Database, Transaction
from nimbos.errors import BudgetExhausted, Conflict, InvalidRequest, NotFound, Overloaded
from nimbos.kernel import budgets, children, heads
from nimbos.kernel.budgets import Allowance
from nimbos.kernel.children import Birth
from nimbos.kernel.drivers.answers import Answered, Undone, refused
from nimbos.kernel.log import Log
from nimbos.kernel.processes import head_of
from nimbos.kernel.segments import Segments
from nimbos.types import new_id
from nimbos.work import ClaimLost, Work

if TYPE_CHECKING:
    from nimbos.kernel.holding import Holding
    from nimbos.kernel.programs import Program, Programs

_NAME_CHARACTERS = 200


class Spawning:
    def __init__(self, database: Database, log: Log, work: Work, segments: Segments, programs: Programs) -> None:
        self._database = database
        self._log = log
        self._work = work
        self._segments = segments
        self._programs = programs

    async def spawn(self, holding: Holding, call_id: str, arguments: Mapping[str, Any]) -> Answered:
        """Raises: StorageUnavailable."""
        try:
            program = await self._program(holding, str(arguments.get("program") or ""))
            birth = await self._birth(holding, program, call_id, arguments)
            given = allowance_of(arguments.get("budget"))
        except (NotFound, InvalidRequest) as error:
            return refused(error)
        own = Allowance() if program.hash == holding.program.hash else budgets.own(program.manifest.budget)
        allowance = given if given != Allowance() else own

        def fund() -> Transaction[None]:
            with _undoing():
                yield from budgets.make(birth.pid, allowance, birth.parent, name=birth.name, given=given != Allowance())

        def create() -> Transaction[None]:
            with _undoing():
                yield from children.create(self._log, self._work, birth)

        return Answered(value={"pid": birth.pid}, child=birth.pid, before=fund, also=create)

    async def _program(self, holding: Holding, wanted: str) -> Program:
        """Raises: NotFound, StorageUnavailable."""
        if not wanted:
            return holding.program
        return await self._programs.load(await self._programs.find(holding.account.id, wanted, inside=holding.program))

    async def _birth(self, holding: Holding, program: Program, call_id: str, arguments: Mapping[str, Any]) -> Birth:
        view, manifest = holding.view, holding.program.manifest
        if not str(arguments.get("model", "")).isprintable():
            raise InvalidRequest("`model` has characters that cannot be shown.", param="model")
        given = await self._segments.put(view.account, arguments.get("input"))
        return Birth(
            pid=new_id("proc"),
            account=holding.account,
            program=program.hash,
            name=_shown(str(arguments.get("name") or program.name)),
            input=given,
            model=str(arguments.get("model") or program.manifest.model.name or view.model),
            ask_class=view.ask_class,
            parent=view.pid,
            detached=bool(arguments.get("detached", False)),
            key=f"spawn\n{view.pid}\n{call_id}",  # with a line break, as no key has that comes from outside
            actor=f"process:{view.pid}",
            depth_most=await self._depth_most(holding),
            children_most=manifest.limits.children,
        )

    async def _depth_most(self, holding: Holding) -> int:
        """Each program above says how deep the tree below its process may be, and each of them holds.

        Raises: NotFound for a program that is gone; StorageUnavailable.
        """
        view = holding.view
        most, above = view.depth + holding.program.manifest.limits.depth, view.parent or view.forked_from
        while above is not None:
            (head,) = map(head_of, await self._database.read(heads.one(above)))
            most = min(most, head.depth + (await self._programs.load(head.program)).manifest.limits.depth)
            above = head.parent or head.forked_from
        return most


def _shown(name: str) -> str:
    """One line, of characters that every database stores."""
    return "".join(letter if letter.isprintable() else " " for letter in name[:_NAME_CHARACTERS])


@contextmanager
def _undoing() -> Iterator[None]:
    """What the transaction refuses is the call's outcome. Raises: Undone."""
    try:
        yield
    except ClaimLost:
        raise
    except (InvalidRequest, Overloaded, Conflict, NotFound, BudgetExhausted) as error:
        raise Undone(error) from error


def allowance_of(given: Any) -> Allowance:
    """As a model or a step says it: of its own budget.

    Raises: InvalidRequest.
    """
    if not given:
        return Allowance()
    try:
        cost = given.get("cost")
        return Allowance(
            tokens=given.get("tokens"),
            cost_micros=None if cost is None else max(1, round(cost * 1_000_000)),
            seconds=given.get("seconds"),
            calls=given.get("calls"),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"This is no budget: {error}.", param="budget") from error
