"""A process as its owner sees it: the head's row, its result, and what it asks of people now."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.api.process_wire import AskedTold, ForkPoint, ProcessTold, Tasks
from nimbos.kernel import Head, Kernel, State, a2a_state, asks_of, mcp_state
from nimbos.types import Account

LIST_RESULTS_BYTES = 4 << 20  # of all results of a list together; those behind that are left out

_NOTHING = msgspec.Raw(b"null")
_PARKED = (State.WAITING, State.ASKING)


class ProcessTeller:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    async def every(self, account: Account, heads: Sequence[Head]) -> list[ProcessTold]:
        """For lists: without what they ask, which takes a fold of each log."""
        await self._kernel.segments.look_up(account.id, (head.result for head in heads if head.result is not None))
        left = LIST_RESULTS_BYTES
        told = []
        for head in heads:
            result = await self._result(account, head) if left > 0 else _NOTHING
            left -= len(bytes(result))
            told.append(_told(head, result if left > 0 else _NOTHING))
        return told

    async def one(self, account: Account, head: Head) -> ProcessTold:
        asks: list[AskedTold] | UnsetType = UNSET
        if head.state is State.ASKING:
            asked = await asks_of(self._kernel.log, self._kernel.segments, head)
            asks = [
                AskedTold(reason=one.reason, about=one.about, question=one.question, what=one.what) for one in asked
            ]
        return _told(head, await self._result(account, head), asks)

    async def _result(self, account: Account, head: Head) -> msgspec.Raw:
        return msgspec.Raw(await self._kernel.text(account, head.result)) if head.result is not None else _NOTHING


def _told(head: Head, result: msgspec.Raw, asks: list[AskedTold] | UnsetType = UNSET) -> ProcessTold:
    return ProcessTold(
        id=head.pid,
        name=head.name,
        program=head.program,
        model=head.model,
        ask_class=head.ask_class,
        state=head.state,
        reason=head.reason,
        about=list(head.about) if head.state in _PARKED else [],
        due_ms=head.due_ms,
        parent=head.parent,
        depth=head.depth,
        detached=head.detached,
        withheld=head.withheld,
        forked_from=ForkPoint(id=head.forked_from, at=head.forked_seq) if head.forked_from is not None else None,
        events=head.seq,
        created_ms=head.created_ms,
        changed_ms=head.changed_ms,
        result=result,
        result_segment=head.result,
        error=head.error,
        usage=dict(head.used),
        tasks=Tasks(
            a2a=a2a_state(head.state, head.reason, begun=head.epoch > 0), mcp=mcp_state(head.state, head.reason)
        ),
        asks=asks,
    )
