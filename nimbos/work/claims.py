"""Durable claims: work that is written down, and done by one at a time. For batch lines, background answers, processes.

Whoever claims work raises its epoch and has it for a lease, which is renewed while the holder lives. A lease that ran
out may be claimed by another, and only the newest epoch can finish, in the same transaction as what the work brought
about: a holder that was stopped and wakes up later changes nothing. What a dead server held lapses by itself.

    waiting ── claim ──▶ claimed ── finish ──▶ gone
       ▲                    │
       └── release, or the lease runs out

Leases are told by the database's clock on PostgreSQL, and by the boot and its monotonic time on SQLite, so a clock that
somebody sets ends none. A lapsed claim that nobody took yet may still finish: it is still the only one.
Knows nothing of what the work is. Read `crew.py` for the tasks that claim and do it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import (
    BigInteger,
    Executable,
    Integer,
    LargeBinary,
    Text,
    bindparam,
    case,
    cast,
    delete,
    extract,
    func,
    null,
    select,
    update,
)
from sqlalchemy import text as sql

from nimbos.db import Database, Dialect, Statement, Transaction, insert_ignored
from nimbos.db.tables.work import work
from nimbos.errors import Conflict

LEASE_S = 15.0
_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")
_BOOT_ROUNDING_S = 600


Held: TypeAlias = tuple[str, str, int]  # kind, ref, epoch


class ClaimLost(Conflict):
    """Somebody else has the work now, or it was dropped: whatever this holder was about to write must not be."""

    code = "claim_lost"

    def __init__(self, claim: Claim) -> None:
        super().__init__(f"The claim on {claim.kind} {claim.ref} (epoch {claim.epoch}) is no longer held.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`epoch`: how often it was claimed. `lapses`: how often a holder let the lease run out, as one does that dies."""

    kind: str
    ref: str
    payload: bytes
    owner: str
    epoch: int
    lapses: int


class Work:
    """`kind` is a queue's name, `ref` is unique in it. All methods are transactions, to be part of larger ones."""

    def __init__(self, database: Database, *, lease_s: float = LEASE_S) -> None:
        self._sqlite = database.dialect == "sqlite"
        self._clock = boot() if self._sqlite else ""
        self._lease_ms = int(lease_s * 1000)
        self.lease_s = lease_s

    def add(self, kind: str, ref: str, payload: bytes = b"", *, delay_s: float = 0.0) -> Transaction[None]:
        """Work to be done once; adding what is there already changes nothing. `delay_s`: not before."""
        free_at_ms = (yield from self._after(delay_s)) if delay_s else 0
        yield _ADD(
            kind=kind,
            ref=ref,
            payload=payload,
            owner=None,
            epoch=0,
            lapses=0,
            clock=self._clock,
            free_at_ms=free_at_ms,
        )

    def add_many(self, kind: str, refs: list[str]) -> Transaction[None]:
        """Like `add` for each, without payloads and in one statement."""
        yield _ADD_MANY(kind=kind, refs=msgspec.json.encode(refs).decode(), clock=self._clock)

    def claim(self, kind: str, owner: str, n: int) -> Transaction[list[Claim]]:
        """At most `n`, those that are free for longest first, then by `ref`."""
        if n <= 0:
            return []
        rows = yield _CLAIM(
            kind=kind, owner=owner, n=n, lease_ms=self._lease_ms, clock=self._clock, **self._sqlite_now()
        )
        claims = [_claim(row) for row in rows]
        return sorted(claims, key=lambda claim: claim.ref)

    def queues(self, prefix: str) -> Transaction[list[str]]:
        """Kinds that begin so and have work that is free, the one that waits longest first."""
        rows = yield _QUEUES(prefix=prefix, **self._sqlite_now())
        return [str(row["kind"]) for row in rows]

    def renew(self, owner: str) -> Transaction[frozenset[Held]]:
        """The leases of all that `owner` holds begin anew: (kind, ref, epoch). What is not among them is lost."""
        rows = yield _RENEW(owner=owner, lease_ms=self._lease_ms, clock=self._clock, **self._sqlite_now())
        return frozenset((row["kind"], row["ref"], row["epoch"]) for row in rows)

    def check(self, claim: Claim) -> Transaction[None]:
        """For what is written in the middle of the work: locks the claim until the transaction ends.

        Raises: ClaimLost.
        """
        rows = yield _CHECK(kind=claim.kind, ref=claim.ref, epoch=claim.epoch, owner=claim.owner)
        if not rows:
            raise ClaimLost(claim)

    def keep(self, claim: Claim, payload: Callable[[], bytes]) -> Transaction[None]:
        """What the next holder finds. `payload` is called when the claim is locked. Raises: ClaimLost."""
        yield from self.check(claim)
        yield _KEEP(kind=claim.kind, ref=claim.ref, payload=payload())

    def finish(self, claim: Claim) -> Transaction[None]:
        """Raises: ClaimLost, and then nothing of this transaction is written."""
        if not (yield from self.end(claim)):
            raise ClaimLost(claim)

    def end(self, claim: Claim) -> Transaction[bool]:
        """Like `finish`, for transactions that go on without it: False when the claim is lost."""
        rows = yield _FINISH(kind=claim.kind, ref=claim.ref, epoch=claim.epoch, owner=claim.owner)
        return bool(rows)

    def release(self, claim: Claim, *, delay_s: float = 0.0) -> Transaction[bool]:
        """Hands the work back, not to be claimed for `delay_s`; False when it was lost already."""
        free_at_ms = (yield from self._after(delay_s)) if delay_s else 0
        rows = yield _RELEASE(
            kind=claim.kind,
            ref=claim.ref,
            epoch=claim.epoch,
            owner=claim.owner,
            clock=self._clock,
            free_at_ms=free_at_ms,
        )
        return bool(rows)

    def release_all(self, owner: str) -> Transaction[None]:
        yield _RELEASE_ALL(owner=owner, clock=self._clock)

    def lapse_all(self, owner: str) -> Transaction[None]:
        """For an owner that is dead: as if its leases had run out, and others had claimed what it held."""
        yield _LAPSE_ALL(owner=owner, clock=self._clock)

    def drop(self, kind: str, ref: str) -> Transaction[bool]:
        """Takes the work away, from a holder too, who cannot finish it any more."""
        rows = yield _DROP(kind=kind, ref=ref)
        return bool(rows)

    def drop_waiting(self, kind: str) -> Transaction[None]:
        """Takes away what nobody has claimed."""
        yield _DROP_WAITING(kind=kind)

    def drop_all(self, kind: str) -> Transaction[None]:
        yield _DROP_ALL(kind=kind)

    def held(self, kind: str) -> Transaction[int]:
        """How many of this kind are claimed, with a lease that runs."""
        rows = yield _HELD(kind=kind, **self._sqlite_now())
        return int(rows[0]["held"])

    def adopt(self) -> Transaction[None]:
        """At start: leases and delays of an earlier boot mean nothing any more, so that work is free."""
        if self._sqlite:
            yield _ADOPT(clock=self._clock)

    def _after(self, delay_s: float) -> Transaction[int]:
        rows = yield _NOW(**self._sqlite_now())
        return int(rows[0]["now_ms"]) + int(delay_s * 1000)

    def _sqlite_now(self) -> dict[str, int]:
        """Read when the statement is about to run: a transaction may have waited for its turn."""
        return {"now_ms": _monotonic_ms()} if self._sqlite else {}


def boot() -> str:
    """Names this run of the machine. Where the system does not, the time it started at, roughly."""
    try:
        return _BOOT_FILE.read_text().strip()
    except OSError:
        return f"about {int((time.time() - time.monotonic()) / _BOOT_ROUNDING_S)}"


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _claim(row: Any) -> Claim:
    return Claim(
        kind=row["kind"],
        ref=row["ref"],
        payload=bytes(row["payload"]),
        owner=row["owner"],
        epoch=row["epoch"],
        lapses=row["lapses"],
    )


def _now_of(dialect: Dialect) -> Any:
    if dialect == "sqlite":
        return bindparam("now_ms", type_=BigInteger)
    return cast(func.floor(extract("epoch", func.clock_timestamp()) * 1000), BigInteger)


def _many(dialect: Dialect) -> Executable:
    """One JSON list becomes rows: a statement for each of 50,000 lines would be a round trip each."""
    each = "json_each(:refs)" if dialect == "sqlite" else "json_array_elements_text(CAST(:refs AS json))"
    empty = "x''" if dialect == "sqlite" else "''::bytea"
    statement = sql(
        "INSERT INTO work (kind, ref, payload, owner, epoch, lapses, clock, free_at_ms) "  # noqa: S608 two constants
        f"SELECT :kind, item.value, {empty}, NULL, 0, 0, :clock, 0 FROM {each} AS item "
        "WHERE true ON CONFLICT (kind, ref) DO NOTHING"
    )
    return statement.bindparams(*(bindparam(name, type_=Text) for name in ("kind", "refs", "clock")))


def _claiming(dialect: Dialect) -> Executable:
    now = _now_of(dialect)
    free = (
        select(work.c.ref)
        .where(work.c.kind == bindparam("kind", type_=Text), work.c.free_at_ms <= now)
        .order_by(work.c.free_at_ms, work.c.ref)
        .limit(bindparam("n", type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("free")
    )
    return (
        update(work)
        .where(work.c.kind == bindparam("kind", type_=Text), work.c.ref.in_(select(free.c.ref)))
        .values(
            owner=bindparam("owner", type_=Text),
            epoch=work.c.epoch + 1,
            lapses=work.c.lapses + case((work.c.owner.is_not(None), 1), else_=0),
            clock=bindparam("clock", type_=Text),
            free_at_ms=now + bindparam("lease_ms", type_=BigInteger),
        )
        .returning(*work.c)
    )


def _looking(dialect: Dialect) -> Executable:
    """Whose work has been free for longest is first. Leaps from kind to kind: there may be much work, of few kinds."""
    first = select(func.min(work.c.kind).label("kind")).cte("queue", recursive=True)
    behind = select(func.min(work.c.kind)).where(work.c.kind > first.c.kind).correlate(first).scalar_subquery()
    queue = first.union_all(select(behind.label("kind")).where(first.c.kind.is_not(None)))
    prefix = bindparam("prefix", type_=Text)
    oldest = select(func.min(work.c.free_at_ms)).where(work.c.kind == queue.c.kind).correlate(queue).scalar_subquery()
    begins = func.substr(queue.c.kind, 1, func.length(prefix)) == prefix
    return select(queue.c.kind).where(begins, oldest <= _now_of(dialect)).order_by(oldest, queue.c.kind)


def _renewing(dialect: Dialect) -> Executable:
    return (
        update(work)
        .where(work.c.owner == bindparam("owner", type_=Text))
        .values(
            clock=bindparam("clock", type_=Text),
            free_at_ms=_now_of(dialect) + bindparam("lease_ms", type_=BigInteger),
        )
        .returning(work.c.kind, work.c.ref, work.c.epoch)
    )


def _counting(dialect: Dialect) -> Executable:
    return select(func.count().label("held")).where(
        work.c.kind == bindparam("kind", type_=Text), work.c.owner.is_not(None), work.c.free_at_ms > _now_of(dialect)
    )


_ADD = insert_ignored(work, key=("kind", "ref"))
_ADD_MANY = Statement(_many)
_CLAIM = Statement(_claiming)
_QUEUES = Statement(_looking)
_RENEW = Statement(_renewing)
_HELD = Statement(_counting)
_NOW = Statement(lambda dialect: select(_now_of(dialect).label("now_ms")))

_THIS = (
    work.c.kind == bindparam("kind", type_=Text),
    work.c.ref == bindparam("ref", type_=Text),
)
_HOLDING = (
    *_THIS,
    work.c.epoch == bindparam("epoch", type_=BigInteger),
    work.c.owner == bindparam("owner", type_=Text),
)
_CHECK = Statement(select(work.c.ref).where(*_HOLDING).with_for_update())
_KEEP = Statement(update(work).where(*_THIS).values(payload=bindparam("payload", type_=LargeBinary)))
_FINISH = Statement(delete(work).where(*_HOLDING).returning(work.c.ref))
_DROP = Statement(delete(work).where(*_THIS).returning(work.c.ref))
_DROP_ALL = Statement(delete(work).where(work.c.kind == bindparam("kind", type_=Text)))
_DROP_WAITING = Statement(delete(work).where(work.c.kind == bindparam("kind", type_=Text), work.c.owner.is_(None)))
_RELEASE = Statement(
    update(work)
    .where(*_HOLDING)
    .values(
        owner=null(),
        clock=bindparam("clock", type_=Text),
        free_at_ms=bindparam("free_at_ms", type_=BigInteger),
    )
    .returning(work.c.ref)
)
_RELEASE_ALL = Statement(
    update(work)
    .where(work.c.owner == bindparam("owner", type_=Text))
    .values(owner=null(), clock=bindparam("clock", type_=Text), free_at_ms=0)
)
_LAPSES = work.c.lapses + case((work.c.owner.is_not(None), 1), else_=0)
_LAPSE_ALL = Statement(
    update(work)
    .where(work.c.owner == bindparam("owner", type_=Text))
    .values(owner=null(), lapses=_LAPSES, clock=bindparam("clock", type_=Text), free_at_ms=0)
)
_ADOPT = Statement(
    update(work)
    .where(work.c.clock != bindparam("clock", type_=Text))
    .values(clock=bindparam("clock", type_=Text), free_at_ms=0, owner=null(), lapses=_LAPSES)
)
