"""What a process that is asking wants of people, in words: read from its log when somebody looks, or answers.

The choices of a function's question are its only answers: its code goes by them. Those of a model's are what it
suggests; what a person may say is not a model's to narrow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Text, bindparam, literal_column, select

from nimbos.db import Database, Statement
from nimbos.db.tables.kernel import process_events
from nimbos.errors import InvalidRequest
from nimbos.kernel.chain import decoded, event_of
from nimbos.kernel.events import CallIntent
from nimbos.kernel.faults import FromNewerVersion
from nimbos.kernel.log import Log
from nimbos.kernel.processes import Head
from nimbos.kernel.segments import Segments
from nimbos.kernel.view import Call, CallStatus, View
from nimbos.kernel.words import Reason, State, Verb

ARGUMENTS_SHOWN_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`about`: the call that an answer is for, "" where it is for none. `what`: that call (`verb`, `resource`,
    `effect`, `arguments` unless they are large, and `choices` where no other answer is taken), or the budget that is
    spent (`meter`, `owner`, `limit`, `used`)."""

    reason: Reason
    about: str
    question: str
    what: dict[str, Any] = field(default_factory=dict)


async def asks_of(log: Log, segments: Segments, head: Head) -> list[Asked]:
    """Nothing unless it is asking. Raises: NotFound, StorageUnavailable, FromNewerVersion."""
    if head.state is not State.ASKING:
        return []
    view = View()
    async for event in log.all(head.pid):  # a page at a time: a long log holds up nobody
        view.apply(event)
    if view.state is not State.ASKING:  # it has gone on since the head was read
        return []
    if view.reason is Reason.BUDGET:
        return [_budget(view)]
    if view.reason is Reason.AUTH:
        question = "The key that it was spawned with is good no more, or may not do this any more."
        return [Asked(reason=Reason.AUTH, about="", question=question)]
    calls = [view.calls[name] for name in view.about if name in view.calls]
    return [await _asked(segments, view, call) for call in _open(calls, view.reason)]


async def check_choice(database: Database, log: Log, segments: Segments, head: Head, about: str, answer: Any) -> None:
    """Whether it asks this now is the mailbox's to say. Raises: InvalidRequest for what is none of the choices."""
    asked = bool(head.asked_seq) and about in head.about
    intent = await _intent_of(database, log, head, about) if asked else None
    if intent is None:
        return
    choices = _choices(intent, await segments.get(head.account, intent.arguments))
    if choices and answer not in choices:
        raise InvalidRequest(
            f"This question takes one of its {len(choices)} choices, word for word: "
            f"`GET /v1/processes/{head.pid}` has them in `asks`. It is still open.",
            param="body",
        )


async def _intent_of(database: Database, log: Log, head: Head, call_id: str) -> CallIntent | None:
    """Of the newest call with this id, also in what was before a fork."""
    for span in reversed(await log.spans(head.pid)):
        rows = await database.read(_INTENT(pid=span.pid, after=span.after, upto=span.upto, call_id=call_id))
        if rows:
            try:
                intent = decoded(event_of(rows[0]))
            except FromNewerVersion:  # whose server takes the answer as it is
                return None
            assert isinstance(intent, CallIntent)
            return intent
    return None


def _choices(intent: CallIntent, arguments: Any) -> tuple[str, ...]:
    """None where any answer will do."""
    if intent.verb is not Verb.ASK or not intent.step or not isinstance(arguments, dict):
        return ()
    return tuple(arguments.get("choices") or ())


def _open(calls: Iterable[Call], reason: Reason) -> list[Call]:
    """What is waited for besides is nobody's to answer."""
    if reason is Reason.INPUT:
        return [call for call in calls if call.intent.verb is Verb.ASK]
    if reason is Reason.IN_DOUBT:
        return [call for call in calls if call.status is CallStatus.UNKNOWN]
    return [call for call in calls if not call.approved]


async def _asked(segments: Segments, view: View, call: Call) -> Asked:
    intent = call.intent
    content = await segments.get_bytes(view.account, intent.arguments)
    small = len(content) <= ARGUMENTS_SHOWN_BYTES
    arguments = msgspec.json.decode(content) if small or intent.verb is Verb.ASK else None
    what: dict[str, Any] = {
        "verb": intent.verb.value,
        "resource": intent.resource,
        "effect": intent.effect.value,
        "arguments": arguments if small else None,
    }
    if choices := _choices(intent, arguments):
        what["choices"] = list(choices)
    return Asked(
        reason=view.reason, about=intent.call_id, question=_question(view.reason, intent.resource, arguments), what=what
    )


def _question(reason: Reason, resource: str, arguments: Any) -> str:
    if reason is Reason.INPUT:
        question = arguments.get("question") if isinstance(arguments, dict) else None
        return question if isinstance(question, str) else "It asks for an answer."
    if reason is Reason.PERMISSION:
        return f"May it call {resource!r} with these arguments?"
    return f"It called {resource!r}, and nobody knows whether that happened. Did it?"


def _budget(view: View) -> Asked:
    spent = view.exhausted
    if spent is None:
        return Asked(reason=Reason.BUDGET, about="", question="Its budget is spent. How much more may it use?")
    return Asked(
        reason=Reason.BUDGET,
        about="",
        question=f"The budget of the {spent.owner} is spent: {spent.used} of {spent.limit} {spent.meter}.",
        what={"meter": spent.meter, "owner": spent.owner, "limit": spent.limit, "used": spent.used},
    )


_INTENT = Statement(
    select(*process_events.c)
    .where(
        process_events.c.pid == bindparam("pid", type_=Text),
        process_events.c.seq > bindparam("after", type_=BigInteger),
        process_events.c.seq <= bindparam("upto", type_=BigInteger),
        process_events.c.call_id == bindparam("call_id", type_=Text),
        process_events.c.kind == literal_column("'call.intent'"),
    )
    .order_by(process_events.c.seq.desc())
    .limit(1)
)
