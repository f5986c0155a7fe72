"""`send` and `pin`: calls that are rows of the log's own transaction. `spawn` is in `spawning.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nimbos.db import Transaction
from nimbos.errors import Conflict, InvalidRequest, NotFound, Overloaded, PayloadTooLarge
from nimbos.kernel import budgets
from nimbos.kernel.budgets import Allowance
from nimbos.kernel.drivers.answers import Answered, Undone, refused
from nimbos.kernel.drivers.spawning import allowance_of
from nimbos.kernel.events import CtxChanged, Segment
from nimbos.kernel.log import Draft, Log
from nimbos.kernel.mailbox import Mail, message_of, post
from nimbos.kernel.processes import locked_head, missing
from nimbos.kernel.segments import Segments
from nimbos.kernel.words import Label, Origin, SignalKind
from nimbos.work import ClaimLost, Work

if TYPE_CHECKING:
    from nimbos.kernel.fold import View

_TOKEN_BYTES = 3  # of text, at least; a pinned note is short, and counted again when it is shown


async def send(
    view: View,
    segments: Segments,
    call_id: str,
    arguments: Mapping[str, Any],
    *,
    log: Log,
    work: Work,
) -> Answered:
    """Words for another process of the same account, in its mailbox when this call is in the log. With `budget`, a
    child gets that much more out of what this process has left, and goes on if that is what it waited for.

    Raises: StorageUnavailable.
    """
    to = str(arguments["to"])
    if not to.isprintable():
        return refused(missing(to))
    try:
        given = allowance_of(arguments.get("budget"))
        body = await segments.put_bytes(view.account, message_of(arguments.get("message")))
    except (InvalidRequest, PayloadTooLarge) as error:
        return refused(error)
    reached: list[str] = []
    mail = Mail(signal=SignalKind.MESSAGE, source=f"process:{view.pid}", external_id=call_id, body=body)

    def pay() -> Transaction[None]:
        if given != Allowance():
            try:
                reached[:] = yield from budgets.give(view.pid, to, given)
            except (NotFound, InvalidRequest) as error:
                raise Undone(error) from error

    def deliver() -> Transaction[None]:
        try:
            head = yield from locked_head(to)
            if head.account != view.account:
                raise missing(to)
            yield from post(log, work, to, mail)
            yield from budgets.tell(log, work, reached, source=mail.source, external_id=f"{call_id}.budget")
        except ClaimLost:
            raise
        except (NotFound, Conflict, Overloaded) as error:
            raise Undone(error) from error

    return Answered(value={"sent": to}, before=pay, also=deliver, origin=Origin.USER)


async def pin(view: View, segments: Segments, call_id: str, arguments: Mapping[str, Any]) -> Answered:
    """A note that stays in view, or the end of one. Raises: StorageUnavailable."""
    if "release" in arguments:
        name = str(arguments["release"])
        if not any(segment.id == name and segment.pinned for segment in view.context):
            return Answered(value=f"Nothing is pinned as {name[:80]!r}.", error="not_found")
        return Answered(value={"released": name}, drafts=(Draft(body=CtxChanged(unpin=(name,)), call_id=call_id),))
    if "text" not in arguments:
        return Answered(
            value="pin needs `text`, or `release` with the name of what was pinned.", error="wrong_arguments"
        )
    name, text = f"{call_id}.pin", str(arguments["text"])
    label = _label_of(view)
    hash = await segments.put(view.account, {"role": "user", "content": f"[Pinned as {name}] {text}"})
    tokens = 16 + len(text.encode()) // _TOKEN_BYTES
    note = Segment(id=name, hash=hash, kind="note", tokens=tokens, pinned=True, label=label)
    return Answered(value={"pinned": name}, drafts=(Draft(body=CtxChanged(add=(note,)), call_id=call_id, label=label),))


def _label_of(view: View) -> Label:
    """The words are the model's, who is what it has read."""
    label = Label()
    for segment in view.context:
        label = label.join(segment.label)
    return label.join(Label(origin=Origin.TOOL))
