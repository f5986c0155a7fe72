"""What a signal's body must be, asked before it is put into a mailbox, so that whoever sends nonsense hears of it.

Whether it comes at the right time is the mailbox's to say, in the transaction that puts it there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from nimbos.api import body as bodies
from nimbos.errors import Conflict, InvalidRequest
from nimbos.kernel import Allowance, Head, Reason, SignalKind, Verdict

ID_CHARACTERS_MAX = 200
_AMOUNT_MAX = 2**53

T = TypeVar("T", bound=msgspec.Struct)
Amount = Annotated[int, msgspec.Meta(ge=0, le=_AMOUNT_MAX)]
Sendable = Literal["message", "answer", "top_up", "pause", "resume", "cancel", "kill"]


class SignalBody(msgspec.Struct, kw_only=True):
    """`id`: of the sender's own; sent again with the same one, it is the same signal. `about`: the question or call
    that an answer is for; without it, the only one there is."""

    signal: Sendable
    about: str | None = None
    body: Any = None
    id: str | None = None


class BudgetBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """None: nothing of its own limits it."""

    tokens: Amount | None = None
    cost_micros: Amount | None = None
    seconds: Amount | None = None
    calls: Amount | None = None

    def allowance(self) -> Allowance:
        return Allowance(tokens=self.tokens, cost_micros=self.cost_micros, seconds=self.seconds, calls=self.calls)


class Approval(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    approve: bool
    why: str = ""


class Settling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`result`: of what happened."""

    verdict: Verdict
    result: Any = None


def checked_id(id: str | None) -> str | None:
    """Raises: InvalidRequest."""
    if id is not None and not (0 < len(id) <= ID_CHARACTERS_MAX and id.isprintable()):
        raise InvalidRequest(f"`id` must have 1 to {ID_CHARACTERS_MAX} characters that can be shown.", param="id")
    return id


def checked_body(signal: SignalBody, head: Head) -> Any:
    """What goes into the mailbox. Raises: InvalidRequest naming the field; Conflict where the process asks for
    something else."""
    kind = SignalKind(signal.signal)
    if kind is SignalKind.ANSWER:
        return _answer(signal.body, head)
    if kind is SignalKind.MESSAGE:
        if signal.body is None:
            raise InvalidRequest("A message needs a `body`.", param="body")
        return signal.body
    if signal.body is not None and kind is not SignalKind.TOP_UP:
        raise InvalidRequest(f"The signal {signal.signal!r} has no `body`.", param="body")
    return signal.body


def top_up_of(body: Any) -> Allowance:
    """Raises: InvalidRequest."""
    if not isinstance(body, dict) or not any(body.values()):
        raise InvalidRequest(
            "A top-up's `body` says how much more: `tokens`, `cost_micros`, `seconds` or `calls`.", param="body"
        )
    return bodies.convert(body, BudgetBody, at="body").allowance()


def _answer(body: Any, head: Head) -> Any:
    """By what the process asks now; what it asks afterwards has another number and is refused in the mailbox."""
    if head.reason is Reason.PERMISSION:
        return msgspec.to_builtins(_converted(body, Approval, "approve: true or false"))
    if head.reason is Reason.IN_DOUBT:
        words = ", ".join(verdict.value for verdict in Verdict)
        settling = _converted(body, Settling, f"verdict: {words}")
        if settling.result is not None and settling.verdict is not Verdict.HAPPENED:
            raise InvalidRequest("Only what `happened` has a `result`.", param="body.result")
        return msgspec.to_builtins(settling)
    if head.reason is Reason.BUDGET:
        raise Conflict("This process asks for budget: send the signal 'top_up'.", param="signal")
    if head.reason is Reason.AUTH:
        raise Conflict(
            "The key that this process runs with is good no more. Mend the key, then send 'resume'.", param="signal"
        )
    if body is None:
        raise InvalidRequest("An answer needs a `body`.", param="body")
    return body


def _converted(body: Any, into: type[T], what: str) -> T:
    if not isinstance(body, dict):
        raise InvalidRequest(f"The `body` of this answer is an object with `{what}`.", param="body")
    return bodies.convert(body, into, at="body")
