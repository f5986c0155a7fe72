"""How a call is written: each is one durable transaction, budgets first, then the log, then everybody else's rows.

    begin    call.intent and call.started, the effect's key, and what it may use
    again    call.started once more, or for the first time behind an approval; the try before it is paid
    put off  call.unknown and call.resolved, by the kernel: to be made again when there is more to spend
    lost     call.unknown; what was held is settled as it was reserved
    finish   call.done, what was used, the signals it came of, and whatever the caller adds

Knows no drivers. `gate.py` decides which of them is next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Text, bindparam, select

from nimbos.db import Statement, Transaction, insert
from nimbos.db.tables.kernel import process_effects
from nimbos.errors import InvalidRequest, PayloadTooLarge
from nimbos.kernel.budgets import reserve_call, settle_call
from nimbos.kernel.drivers.answers import Answered, Undone, refused
from nimbos.kernel.drivers.paging import HANDLE_CHARACTERS, head_of
from nimbos.kernel.effects import HARMLESS
from nimbos.kernel.events import (
    CallDone,
    CallIntent,
    CallResolved,
    CallStarted,
    CallUnknown,
    Event,
    SignalConsumed,
)
from nimbos.kernel.fold import Call
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Prepared, Segments, text_of
from nimbos.kernel.syscall import Also, Outcome
from nimbos.kernel.words import Label, Origin, Verdict

_INSERT_KEY = insert(process_effects)
_FIND_KEY = Statement(select(process_effects.c.call_id).where(process_effects.c.key == bindparam("key", type_=Text)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What `finish` writes around an outcome. `first`: events before it. `reserved_ms`: what the call holds of its
    budget, None for nothing; `used_ms` of it, None where nobody knows."""

    first: tuple[Draft, ...] = ()
    reserved_ms: int | None = None
    used_ms: int | None = None
    withheld: bool = False
    label: Label = field(default_factory=Label)


async def begin(holding: Holding, intent: CallIntent, *, label: Label) -> None:
    """Raises: BudgetExhausted; Overloaded, where calls that run now may give something back; Fenced,
    StorageUnavailable."""
    call_id = intent.call_id

    def transaction() -> Transaction[list[Event]]:
        held = yield from reserve_call(holding.pid, call_id, deadline_ms=intent.deadline_ms)
        events = yield from holding.appending(
            *held,
            Draft(body=intent, call_id=call_id, label=label),
            Draft(body=CallStarted(call_id=call_id, attempt=1), call_id=call_id),
        )
        yield from _keep_key(holding, intent)
        return events

    await holding.write(transaction)


async def intend(holding: Holding, intent: CallIntent, *, label: Label) -> None:
    """The intent alone: nothing begins yet. Raises: Fenced, StorageUnavailable."""
    await holding.append(Draft(body=intent, call_id=intent.call_id, label=label))


async def again(holding: Holding, call: Call, *, first: Sequence[Draft] = (), tried_ms: int | None = None) -> None:
    """`tried_ms`: how long the try before this one took; None: there was none, or it was settled when nobody knew what
    came of it.

    Raises: as `begin`, and then nothing of this is written.
    """
    intent = call.intent
    started = Draft(body=CallStarted(call_id=intent.call_id, attempt=call.attempts + 1), call_id=intent.call_id)

    def transaction() -> Transaction[list[Event]]:
        paid: tuple[Draft, ...] = ()
        if tried_ms is not None:
            held_ms = reserved_ms(holding, intent)
            paid = yield from settle_call(
                holding.pid, intent.call_id, reserved_ms=held_ms, used_ms=tried_ms, counted=False
            )
        held = yield from reserve_call(holding.pid, intent.call_id, deadline_ms=intent.deadline_ms)
        events = yield from holding.appending(*first, *paid, *held, started)
        if not call.attempts:
            yield from _keep_key(holding, intent)
        return events

    await holding.write(transaction)


async def put_off(holding: Holding, call: Call, *, tried_ms: int) -> None:
    """Nothing is left to spend for another try: the one before is paid, and the call holds nothing and is to be begun.

    Raises: Fenced, StorageUnavailable."""
    call_id = call.intent.call_id
    retried = CallResolved(call_id=call_id, verdict=Verdict.RETRY, by="kernel")

    def transaction() -> Transaction[list[Event]]:
        paid = yield from settle_call(
            holding.pid, call_id, reserved_ms=reserved_ms(holding, call.intent), used_ms=tried_ms, counted=False
        )
        drafts = (Draft(body=body, call_id=call_id) for body in (CallUnknown(call_id=call_id), retried))
        return (yield from holding.appending(*drafts, *paid))

    await holding.write(transaction)


async def lost(holding: Holding, call: Call) -> None:
    """Raises: Fenced, StorageUnavailable."""
    intent = call.intent

    def transaction() -> Transaction[list[Event]]:
        settled = yield from settle_call(
            holding.pid, intent.call_id, reserved_ms=reserved_ms(holding, intent), used_ms=None
        )
        unknown = Draft(body=CallUnknown(call_id=intent.call_id), call_id=intent.call_id)
        return (yield from holding.appending(unknown, *settled))

    await holding.write(transaction)


async def finish(
    holding: Holding, segments: Segments, call_id: str, answered: Answered, ending: Ending, *, also: Also
) -> Outcome:
    """Raises: Fenced, StorageUnavailable."""
    outcome, result = await outcome_of(holding, segments, call_id, answered, withheld=ending.withheld)
    extra = await also(outcome)
    printed = await segments.put(holding.view.account, answered.printed) if answered.printed else None
    done = Draft(
        body=CallDone(
            call_id=call_id,
            result=outcome.segment,
            size_bytes=outcome.size_bytes,
            error=outcome.error,
            withheld=outcome.withheld,
            child=outcome.child,
            printed=printed,
        ),
        call_id=call_id,
        label=ending.label.join(Label(origin=answered.origin)),
    )
    consumed = tuple(
        Draft(body=SignalConsumed(received=seq, call_id=call_id), call_id=call_id, cause=seq)
        for seq in answered.consumed
    )

    def transaction() -> Transaction[list[Event]]:
        yield from result.writing()  # first: on PostgreSQL it waits for whoever writes the same, and must hold nothing
        if answered.before is not None:
            yield from answered.before()
        settled: tuple[Draft, ...] = ()
        if ending.reserved_ms is not None:
            settled = yield from settle_call(
                holding.pid, call_id, reserved_ms=ending.reserved_ms, used_ms=ending.used_ms
            )
        events = yield from holding.appending(*ending.first, done, *settled, *consumed, *extra, *answered.drafts)
        if answered.also is not None:
            yield from answered.also()
        return events

    try:
        await holding.write(transaction, others=answered.also is not None)
    except Undone as undone:
        return await finish(holding, segments, call_id, refused(undone.error), ending, also=also)
    segments.written(result)
    return outcome


async def outcome_of(
    holding: Holding, segments: Segments, call_id: str, answered: Answered, *, withheld: bool = False
) -> tuple[Outcome, Prepared]:
    """What came of it, and its result, to be written. What cannot be kept is an error that says so."""
    value: Any = answered.value
    error, child, shown = answered.error, answered.child, answered.shown
    try:
        result = await segments.prepare(holding.view.account, value, wrapped=answered.wrapped)
    except (InvalidRequest, PayloadTooLarge) as problem:
        value, shown = problem.message, None
        error = "too_large" if isinstance(problem, PayloadTooLarge) else "not_json"
        result = await segments.prepare(holding.view.account, value)
    size_bytes = len(text_of(value).encode("utf-8", "replace"))
    head_bytes = holding.program.manifest.limits.result_bytes
    if shown is None:
        shown = head_of(value, handle=result.hash[:HANDLE_CHARACTERS], head_bytes=head_bytes)
        whole = result.hash if size_bytes > head_bytes else None
    else:
        whole = None
    outcome = Outcome(
        call_id=call_id,
        value=value,
        shown=f"Error ({error}): {shown}" if error else shown,
        segment=result.hash,
        size_bytes=size_bytes,
        error=error,
        whole=whole,
        withheld=withheld,
        child=child,
    )
    return outcome, result


def reserved_ms(holding: Holding, intent: CallIntent) -> int:
    """What its last try holds, and may take: what was granted, or, where no budget limits it, its deadline."""
    held = holding.view.spending.reserved.get(intent.call_id, {})
    return held.get("seconds_ms", intent.deadline_ms)


def context_label(holding: Holding) -> Label:
    """Of everything the model has read: what it writes is no more trusted than that. The label place of the gate."""
    label = Label()
    for segment in holding.view.context:
        label = label.join(segment.label)
    return label.join(Label(origin=Origin.USER))


def _keep_key(holding: Holding, intent: CallIntent) -> Transaction[None]:
    """One row for each effect that is one: a second intent with the same key is a fault of ours, and is refused."""
    if intent.effect in HARMLESS:
        return
    found = yield _FIND_KEY(key=intent.key)
    if found and found[0]["call_id"] == intent.call_id:
        return
    yield _INSERT_KEY(key=intent.key, pid=holding.pid, call_id=intent.call_id, intended_ms=time.time_ns() // 1_000_000)
