"""Where a fork begins: an event of a process's past, with all that was written together with it, as without that it
would be nowhere the process ever was. `forks.py` makes the forks.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, Text, bindparam, literal_column, select

from nimbos.db import Database, Row, Statement, Transaction
from nimbos.db.tables.kernel import process_events
from nimbos.db.tables.processes import processes
from nimbos.errors import InvalidRequest
from nimbos.kernel import heads
from nimbos.kernel.chain import decoded, event_of
from nimbos.kernel.events import ModelIntent
from nimbos.kernel.log import Log
from nimbos.kernel.words import State

_FOLLOWING = frozenset({"ctx.changed", "budget.settled", "signal.consumed"})  # what an outcome or a message brings
_DECIDED = frozenset({"call.resolved", "signal.consumed"})  # a person's word on a call, whose outcome comes with it
_TOGETHER_MAX = 256
_TIP = 2**62  # behind every event


async def last_answer(database: Database, log: Log, pid: str) -> int | None:
    """Of a process that is over: the event before its last answer was begun, so that there is something left to do.
    None: it is not over, or never asked.

    Raises: StorageUnavailable.
    """
    rows = await database.read(heads.one(pid))
    if not rows or rows[0]["state"] != State.DONE.value:
        return None
    begun = ""  # the ask that the last one goes on with, which was cut off
    for span in reversed(await log.spans(pid)):
        upto = span.upto
        while found := await database.read(_LAST_ASK(pid=span.pid, after=span.after, upto=upto)):
            intent = decoded(event_of(found[0]))
            assert isinstance(intent, ModelIntent)
            upto = int(found[0]["seq"]) - 1
            if begun not in ("", intent.ask_id):
                continue
            if not intent.continues:
                return max(1, upto)
            begun = intent.continues
    return None


def point(pid: str, seq: int) -> Transaction[tuple[int, str]]:
    """Of a fork at this event of the process's past: (seq, hash). Raises: InvalidRequest."""
    of: str | None = pid
    upto = _TIP
    while of is not None:
        (origin,) = yield _ORIGIN(pid=of)
        if seq > origin["forked_seq"]:
            rows = yield _BEHIND(pid=of, seq=seq, upto=upto, most=_TOGETHER_MAX)
            if not rows or rows[0]["seq"] != seq:
                break
            last = rows[0]
            for row in rows[1:]:
                if not _together(last, row):
                    break
                last = row
            return int(last["seq"]), str(last["hash"])
        of, upto = origin["forked_from"], min(upto, origin["forked_seq"])
    raise InvalidRequest(f"The process {pid} has no event {seq}; `nimbos logs {pid}` shows which it has.", param="at")


def _together(last: Row, row: Row) -> bool:
    """Whether an event follows from the one before it, in the same transaction."""
    if (row["ts_ms"], row["epoch"]) != (last["ts_ms"], last["epoch"]):
        return False
    told = row["kind"] == "call.done" and last["kind"] in _DECIDED and row["call_id"] == last["call_id"]
    return told or row["kind"] in _FOLLOWING


_PID = bindparam("pid", type_=Text)
_UPTO = process_events.c.seq <= bindparam("upto", type_=BigInteger)
_ORIGIN = Statement(select(processes.c.forked_from, processes.c.forked_seq).where(processes.c.id == _PID))
_BEHIND = Statement(
    select(*(process_events.c[name] for name in ("seq", "hash", "kind", "call_id", "ts_ms", "epoch")))
    .where(process_events.c.pid == _PID, process_events.c.seq >= bindparam("seq", type_=BigInteger), _UPTO)
    .order_by(process_events.c.seq)
    .limit(bindparam("most", type_=Integer))
)
_LAST_ASK = Statement(
    select(*process_events.c)
    .where(
        process_events.c.pid == _PID,
        process_events.c.kind == literal_column("'model.intent'"),
        process_events.c.seq > bindparam("after", type_=BigInteger),
        _UPTO,
    )
    .order_by(process_events.c.seq.desc())
    .limit(1)
)
