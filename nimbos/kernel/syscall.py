"""What goes into the gate and what comes out of it. Read `gate.py` next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from nimbos.kernel.words import Reason, State, Verb

if TYPE_CHECKING:
    from nimbos.kernel.log import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Syscall:
    """`call_id`: unique in its process, the same whenever this call is made again. `resource`: of a tool its name.
    `arguments`: a JSON value; the gate checks it, and knows the effect. `step`: the key of a durable function's step,
    whose author needs no leave for the kernel's own verbs. `deadline_s`: where it is shorter than the tool's."""

    call_id: str
    verb: Verb
    resource: str = ""
    arguments: Any = None
    step: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`value`: the whole result. `shown`: what a model is shown of it, and if that is only the head, `whole` is the
    hash of the whole. `segment`: hash of the whole, "" for a refusal. `error`: a code where it went wrong, and the
    value is then a sentence for the model. `child`: of a spawn, its pid."""

    call_id: str
    value: Any
    shown: str
    segment: str = ""
    size_bytes: int = 0
    error: str = ""
    whole: str | None = None
    withheld: bool = False
    child: str = ""


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
    """One state for several waits. What a person must do is shown, one kind of it at a time, since an answer is checked
    by what is asked; any of the waits wakes the process, and all are looked at then."""
    every = list(waits)
    asking = next((wait for wait in every if wait.state is State.ASKING), None)
    first = asking or every[0]
    shown = every if asking is None else [wait for wait in every if wait.reason is asking.reason]
    due_ms = min((wait.due_ms for wait in every if wait.due_ms is not None), default=None)
    shown.sort(key=lambda wait: wait.due_ms is None or wait.due_ms != due_ms)  # a timer names the first
    about = tuple(dict.fromkeys(name for wait in shown for name in wait.about))
    return Wait(state=first.state, reason=first.reason, due_ms=due_ms, about=about)
