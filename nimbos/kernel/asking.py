"""What a process that is asking wants of people, in words: read from its log when somebody looks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nimbos.kernel.log import Log
from nimbos.kernel.processes import Head
from nimbos.kernel.segments import Segments
from nimbos.kernel.view import Call, CallStatus, View
from nimbos.kernel.words import Reason, State, Verb

ARGUMENTS_SHOWN_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`about`: the call that an answer is for, "" where it is for none. `what`: that call (`verb`, `resource`,
    `effect`, and `arguments` unless they are large), or the budget that is spent (`meter`, `owner`, `limit`,
    `used`)."""

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
    arguments = msgspec.json.decode(content) if len(content) <= ARGUMENTS_SHOWN_BYTES else None
    what = {
        "verb": intent.verb.value,
        "resource": intent.resource,
        "effect": intent.effect.value,
        "arguments": arguments,
    }
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
