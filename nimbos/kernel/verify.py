"""Whether a log is as it was written: dense, chained, ending where its head says, and legal.

What it cannot see is a log that was rewritten whole, with its head: keep a hash elsewhere (`nimbos logs` shows them),
and compare.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass

import msgspec

from nimbos.db import Row
from nimbos.kernel.chain import event_of, link
from nimbos.kernel.faults import Illegal, Unreadable
from nimbos.kernel.processes import Head
from nimbos.kernel.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """`events`: how many are good. `broken_at`: the seq of the first that is not; None where all are. `why`: "" then.
    `hash`: of the last good one."""

    events: int
    hash: str
    broken_at: int | None = None
    why: str = ""


async def verify(head: Head, rows: AsyncIterable[Row]) -> Verified:
    """`rows`: from the first event of its past, read after `head` was.

    Raises: FromNewerVersion.
    """
    view = View()
    events, hash, why = 0, "", None
    async for row in rows:
        if row["seq"] == head.seq and row["hash"] != head.hash:
            why = "its hash is not the one that the process's head has"
        why = why or _why_broken(row, view)
        if why is not None:
            return Verified(events=events, hash=hash, broken_at=events + 1, why=why)
        events, hash = view.seq, view.hash
    if events < head.seq:
        why = f"the log ends before it, and the process's head says {head.seq}"
        return Verified(events=events, hash=hash, broken_at=events + 1, why=why)
    return Verified(events=events, hash=hash)


def _why_broken(row: Row, view: View) -> str | None:
    """Goes on to this event, or says why not."""
    if row["seq"] != view.seq + 1:
        return "it is missing"
    if row["prev_hash"] != view.hash:
        return "it is not chained to the event before"
    try:
        if link(row) != row["hash"]:
            return "its hash is not that of its content"
        view.apply(event_of(row))
    except (msgspec.MsgspecError, ValueError, TypeError) as error:  # a column that holds something else
        return f"a column cannot be read ({type(error).__name__})"
    except (Illegal, Unreadable) as error:
        return error.message
    return None
