"""What goes into the gate and what comes out of it. Read `gate.py` next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from nimbos.kernel.words import Effect, Reason, State, Verb

if TYPE_CHECKING:
    from nimbos.kernel.log import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Syscall:
    """`call_id`: unique in its process, the same whenever this call is made again. `arguments`: a JSON value, checked.
    `bound_to`: hash of the tool's definition and the arguments. `step`: the key of a durable function's step."""

    call_id: str
    verb: Verb
    resource: str = ""
    arguments: Any = None
    effect: Effect = Effect.INTERNAL
    bound_to: str = ""
    deadline_s: float = 60.0
    step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`value`: the whole result. `shown`: what a model is shown of it: the same, or a head with a handle, and then
    `whole` is the hash of the whole. `segment`: hash of the whole, "" for a refusal. `error`: a code where it went
    wrong, and the value is then a sentence for the model; "denied" for what was refused before it began."""

    call_id: str
    value: Any
    shown: Any
    segment: str
    size_bytes: int
    error: str = ""
    whole: str | None = None
    withheld: bool = False


# What the caller adds to the log in the transaction that writes the outcome: how a model is told, above all.
Also: TypeAlias = Callable[[Outcome], Awaitable[Sequence["Draft"]]]


async def nothing(outcome: Outcome) -> Sequence[Draft]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The call has no outcome yet, and nothing is to be done for it until something arrives or `due_ms` has come."""

    state: State
    reason: Reason
    due_ms: int | None = None
    about: tuple[str, ...] = ()


def joined(waits: Iterable[Wait]) -> Wait:
    """One state for several waits: whatever a person must do is what is shown, any of them wakes it."""
    every = list(waits)
    first = next((wait for wait in every if wait.state is State.ASKING), every[0])
    dues = [wait.due_ms for wait in every if wait.due_ms is not None]
    about = tuple(dict.fromkeys(name for wait in [first, *every] for name in wait.about))
    return Wait(state=first.state, reason=first.reason, due_ms=min(dues, default=None), about=about)
