"""What a person says of a call: may it be, and did it happen. Their answers are signals about the call's id.

An answer that is neither is consumed and changes nothing: the process asks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nimbos.kernel.drivers.answers import Answered
from nimbos.kernel.drivers.waiting import signals_about
from nimbos.kernel.events import CallApproved, CallIntent, CallResolved, SignalConsumed
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Segments
from nimbos.kernel.words import Origin, SignalKind, Verdict

_WHY_CHARACTERS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """`refused`: why, for the model; None: it may be. `drafts` say so in the log."""

    by: str
    refused: str | None
    drafts: tuple[Draft, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A person's word on an effect in doubt. `answered`: what the call came to, unless it is to be tried again."""

    verdict: Verdict
    answered: Answered
    drafts: tuple[Draft, ...]


async def approval(holding: Holding, segments: Segments, intent: CallIntent) -> Approval | None:
    """None: nobody has said anything yet. An approval is for the intent's own definition and arguments.

    Raises: what `Holding.append` raises.
    """
    answer = await _answer(holding, segments, intent)
    if answer is None:
        return None
    said, by, consumed = answer
    allowed = said.get("approve")
    if not isinstance(allowed, bool) or said.get("bound_to", intent.bound_to) != intent.bound_to:
        await holding.append(consumed)
        return None
    if not allowed:
        why = str(said.get("why") or "")[:_WHY_CHARACTERS]
        refused = f"A person refused this call{f': {why}' if why else '.'}"
        return Approval(by=by, refused=refused, drafts=(consumed,))
    approved = CallApproved(call_id=intent.call_id, by=by, bound_to=intent.bound_to)
    return Approval(by=by, refused=None, drafts=(_draft(approved, by), consumed))


async def settled(holding: Holding, segments: Segments, intent: CallIntent) -> Settled | None:
    """None: nobody has said anything yet. Raises: what `Holding.append` raises."""
    answer = await _answer(holding, segments, intent)
    if answer is None:
        return None
    said, by, consumed = answer
    try:
        verdict = Verdict(str(said.get("verdict", "")))
    except ValueError:
        await holding.append(consumed)
        return None
    result = said.get("result")
    kept = None if result is None else await segments.put(holding.view.account, result)
    resolved = CallResolved(call_id=intent.call_id, verdict=verdict, by=by, result=kept)
    return Settled(verdict=verdict, answered=_answered(verdict, result), drafts=(_draft(resolved, by), consumed))


def _answered(verdict: Verdict, result: Any) -> Answered:
    if verdict is Verdict.HAPPENED:
        shown = "It happened, says a person; what came of it is not known." if result is None else None
        return Answered(value=result, shown=shown, origin=Origin.USER)
    if verdict is Verdict.DID_NOT:
        return Answered(value="It did not happen, says a person.", error="did_not_happen", origin=Origin.USER)
    unknown = "Nobody knows whether it happened, and a person decided to leave it at that. Do not do it again."
    return Answered(value=unknown, error="unknown", origin=Origin.USER)


async def _answer(
    holding: Holding, segments: Segments, intent: CallIntent
) -> tuple[Mapping[str, Any], str, Draft] | None:
    """What was said, who said it, and the event that says so."""
    signal = next(signals_about(holding.view, SignalKind.ANSWER, intent.call_id), None)
    if signal is None:
        return None
    said = await segments.get(holding.view.account, signal.body) if signal.body else None
    consumed = SignalConsumed(received=signal.seq, call_id=intent.call_id)
    draft = Draft(body=consumed, call_id=intent.call_id, cause=signal.seq)
    return said if isinstance(said, dict) else {}, signal.source, draft


def _draft(body: CallApproved | CallResolved, by: str) -> Draft:
    return Draft(body=body, call_id=body.call_id, actor=by)
