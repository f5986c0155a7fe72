"""The kernel's own verbs, whichever: each is answered now, or waits. Nothing of it is written yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nimbos.kernel import heads
from nimbos.kernel.drivers.answers import Answered
from nimbos.kernel.drivers.builtin import WAITING
from nimbos.kernel.drivers.internal import pin, send
from nimbos.kernel.drivers.paging import page_of, read_page
from nimbos.kernel.drivers.spawning import Spawning
from nimbos.kernel.drivers.waiting import Look, look, out_of_budget
from nimbos.kernel.events import CallIntent
from nimbos.kernel.processes import head_of
from nimbos.kernel.syscall import Wait
from nimbos.kernel.words import Reason, State, Verb

if TYPE_CHECKING:
    from nimbos.kernel.fold import View
    from nimbos.kernel.holding import Holding, Shared
    from nimbos.kernel.programs import Programs


class Own:
    def __init__(self, shared: Shared, programs: Programs) -> None:
        self._shared = shared
        self._programs = programs
        self._spawning = Spawning(shared.database, shared.log, shared.work, shared.segments, programs)

    async def perform(self, holding: Holding, intent: CallIntent, arguments: Any) -> Answered | Wait:
        """Raises: NotFound for a segment that is gone; StorageUnavailable."""
        view, segments, call_id = holding.view, self._shared.segments, intent.call_id
        if intent.verb in WAITING:
            waits = intent.verb is Verb.WAIT
            at = Look(
                call_id=call_id,
                verb=intent.verb,
                arguments=arguments,
                now_ms=holding.now_ms(),
                asking=await self._asking(holding, intent, arguments) if waits else frozenset(),
                gone=await self._gone(view) if waits else {},
            )
            return await look(view, segments, at)
        if intent.verb is Verb.SPAWN:
            return await self._spawning.spawn(holding, call_id, arguments)
        if intent.verb is Verb.SEND:
            return await send(view, segments, call_id, arguments, log=self._shared.log, work=self._shared.work)
        if intent.verb is Verb.PIN:
            return await pin(view, segments, call_id, arguments)
        assert intent.verb is Verb.READ, intent.verb
        page_bytes = holding.program.manifest.limits.result_bytes
        if (path := str(arguments["handle"])) in holding.program.documents:
            return page_of(await self._programs.file(holding.program, path), arguments, page_bytes=page_bytes)
        return await read_page(view, segments, arguments, page_bytes=page_bytes)

    async def _asking(self, holding: Holding, intent: CallIntent, arguments: Any) -> frozenset[str]:
        """Children that are out of budget now, for whoever wants to know while it waits: a model that can give them
        more, and would else never learn of it; a function that says so. Raises: StorageUnavailable."""
        gives = not intent.step and "send" in holding.program.manifest.tools.builtin
        if not arguments.get("asking", gives):
            return frozenset()
        rows = [row for pid in out_of_budget(holding.view) for row in await self._shared.database.read(heads.one(pid))]
        return frozenset(
            row["id"] for row in rows if (row["state"], row["reason"]) == (State.ASKING.value, Reason.BUDGET.value)
        )

    async def _gone(self, view: View) -> dict[str, Any]:
        """How children ended that were begun before this process was forked, and were over before it could be told.

        Raises: NotFound for a segment that is gone; StorageUnavailable.
        """
        found = {}
        for pid in [pid for pid, child in view.children.items() if child.foreign and child.exited is None]:
            for head in map(head_of, await self._shared.database.read(heads.one(pid))):
                if head.state is State.DONE:
                    result = await self._shared.segments.get(view.account, head.result) if head.result else None
                    found[pid] = {"reason": head.reason, "result": head.error or result}
        return found
