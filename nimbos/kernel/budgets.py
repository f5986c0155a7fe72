"""What a process may spend, and what happens when that is spent: it parks with its work intact.

    spawn     `make`: four rows, below its parent's            (in the transaction that makes the child)
    a call    `reserve_call` with its intent, `settle_call` with its outcome; asks are held by `ledger.reserve`
    spent     `exhausted`: budget.exhausted, asking(budget), and a message to the parent, in one transaction
    more      `top_up` by a person, `give` by a parent: the limits, and a signal to every process that may go on

Budgets are locked before heads: call these first in a transaction. The rows are the ledger's (`ledger/allowances.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from nimbos.db import Transaction
from nimbos.errors import BudgetExhausted, Conflict, Overloaded
from nimbos.kernel import events
from nimbos.kernel.log import Draft, Log
from nimbos.kernel.mailbox import Mail, is_full, post
from nimbos.kernel.processes import locked_head
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.ledger import Allowance, allowances
from nimbos.work import ClaimLost, Work

if TYPE_CHECKING:
    from nimbos.kernel.holding import Holding
    from nimbos.kernel.manifest import Budget
    from nimbos.kernel.view import View

__all__ = [
    "Allowance",
    "GivenBefore",
    "Told",
    "close",
    "exhausted",
    "give",
    "make",
    "meant",
    "own",
    "reserve_call",
    "settle_call",
    "spent",
    "tell",
    "top_up",
]

_EVERY = Allowance()
_MS = 1000
Told: TypeAlias = tuple[tuple[str, bool], ...]  # a process, and whether there is work now


def make(
    pid: str, allowance: Allowance | None, parent: str | None, *, name: str = "", given: bool = True
) -> Transaction[None]:
    """Of a new process. `parent`: whose budget it draws on: its parent's, or that of the process it was forked from.
    `given` False: nobody said so but its own program.

    Raises: InvalidRequest, also when the parent has less left than it would give.
    """
    yield from allowances.make(pid, allowance or _EVERY, name=name, parent=parent, given=given)


def own(budget: Budget) -> Allowance:
    """What a program says of itself."""
    return Allowance(tokens=budget.tokens, cost_micros=budget.cost_micros, seconds=budget.seconds, calls=budget.calls)


def meant(given: Allowance | None, budget: Budget) -> Allowance:
    """Of a new process: what whoever starts it says, and of each meter that they do not name what its program says."""
    said, program = given or _EVERY, own(budget)
    return Allowance(
        **{
            field.name: amount if (amount := getattr(said, field.name)) is not None else getattr(program, field.name)
            for field in fields(Allowance)
        }
    )


def reserve_call(pid: str, call_id: str, *, deadline_ms: int) -> Transaction[tuple[Draft, ...]]:
    """Before a try of the call, in its transaction; what to append before that. Where some budget holds the call, it
    says what this try may take, which is less than the call's own deadline where less is left.

    Raises: BudgetExhausted; Overloaded, where calls that run now may give something back.
    """
    hold = yield from allowances.reserve_call(pid, deadline_ms=deadline_ms)
    if not hold.limited:
        return ()
    return tuple(
        Draft(body=events.BudgetReserved(meter=meter, amount=amount, call_id=call_id), call_id=call_id)
        for meter, amount in hold.amounts.items()
    )


def settle_call(
    pid: str, call_id: str, *, reserved_ms: int, used_ms: int | None, counted: bool = True
) -> Transaction[tuple[Draft, ...]]:
    """With the outcome of a try, in its transaction; what to append behind it. `reserved_ms`: what the try holds.
    `used_ms` None: nobody knows, so it is what was reserved. `counted` False: the same call is tried again."""
    taken_ms = reserved_ms if used_ms is None else max(0, used_ms)
    used = yield from allowances.settle_call(pid, reserved_ms=reserved_ms, used_ms=taken_ms, calls=int(counted))
    return (Draft(body=events.BudgetSettled(used=used, call_id=call_id), call_id=call_id),)


def close(pid: str) -> Transaction[None]:
    """The process is over: what its open calls still hold is settled."""
    yield from allowances.close(pid)


async def exhausted(holding: Holding, error: BudgetExhausted, *, drafts: Sequence[Draft] = ()) -> None:
    """Parks the process in asking(budget), with `drafts` before that, and tells its parent, all in one transaction.
    Where the budget's period ends by itself, a timer wakes it then.

    Raises: Parked, always, if nothing else.
    """
    body = events.BudgetExhausted(meter=error.meter, owner=error.owner, limit=error.limit, used=error.used)
    due_ms = None if error.retry_after_s is None else holding.now_ms() + int(error.retry_after_s * _MS)
    parent, tell = holding.view.parent, None
    if parent is not None:
        said = await holding.put(
            f"Your child {holding.pid} ({holding.view.name}) is out of budget and waits: {error.used} of {error.limit} "
            f"{error.meter} of the {error.owner} are used."
        )
        epoch = f"budget {holding.holder.epoch}"  # it parks once in an epoch
        mail = Mail(
            signal=SignalKind.MESSAGE, source=f"process:{holding.pid}", external_id=epoch, about=holding.pid, body=said
        )
        tell = partial(_tell_parent, parent=parent, mail=mail)
    await holding.park(State.ASKING, Reason.BUDGET, due_ms=due_ms, drafts=(*drafts, Draft(body=body)), tell=tell)


def spent(view: View) -> Transaction[BudgetExhausted | None]:
    """Which budget of processes ended an answer in its middle; the other owners' refuse the next ask themselves."""
    return allowances.spent(view.pid)


def top_up(log: Log, work: Work, pid: str, allowance: Allowance, *, source: str, external_id: str) -> Transaction[Told]:
    """More from outside, once for each `external_id`; without an amount they only try again. The process is told, and
    all that draw on it and ask for budget.

    Raises: InvalidRequest, NotFound; Conflict for a process that is over.
    """
    reached = yield from allowances.top_up(pid, allowance)
    return (yield from tell(log, work, reached, source=source, external_id=external_id))


def give(parent: str, child: str, allowance: Allowance) -> Transaction[list[str]]:
    """More for a child, of what its parent has left; whom to `tell` of it, once their parent's head is locked.

    Raises: InvalidRequest, NotFound.
    """
    return allowances.give(parent, child, allowance)


class GivenBefore(Exception):
    """This very signal was sent before: its transaction is undone, and nothing is given a second time."""


def tell(log: Log, work: Work, reached: Sequence[str], *, source: str, external_id: str) -> Transaction[Told]:
    """The first of them, and of the others those that ask for budget, or run and may be about to.

    Raises: GivenBefore.
    """
    told = []
    for pid in reached:
        first = pid == reached[0]
        # The others may have been sent a signal of their own with this id.
        id = external_id if first else f"{external_id} of {reached[0]}"
        mail = Mail(signal=SignalKind.TOP_UP, source=source, external_id=id)
        head = yield from locked_head(pid)
        asks = (head.state, head.reason) == (State.ASKING, Reason.BUDGET)
        if not first and not asks and (head.state is not State.RUNNING or is_full(head)):
            continue  # who has mail does not park
        posted = yield from post(log, work, pid, mail)
        if not posted.new and first:
            raise GivenBefore
        told.append((pid, posted.woken))
    return tuple(told)


def _tell_parent(log: Log, work: Work, *, parent: str, mail: Mail) -> Transaction[Told]:
    """A parent that is over, or whose mailbox is full, is told nothing."""
    try:
        posted = yield from post(log, work, parent, mail)
    except ClaimLost:
        raise
    except (Conflict, Overloaded):
        return ()
    return ((parent, posted.woken),)
