"""How fast an owner may go: requests and tokens a minute, and asks at once.

A limit and its two buckets (`rate.py`) are one row, locked while an ask is let in, so that several servers on one
database share it. `model` `*` counts all models together. Asks at once are the open rows of `asks`: a server that dies
leaves them to recovery, and no counter can drift.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import msgspec
from sqlalchemy import ColumnElement, and_, bindparam, func, literal_column, or_, select, update

from nimbos.db import Row, Statement, Transaction, upsert
from nimbos.db.tables.ledger import asks, limits
from nimbos.errors import InvalidRequest, Overloaded
from nimbos.ledger.owners import OWNER_KINDS, Owners, named
from nimbos.ledger.rate import DUE_NS_MAX, Take, at_new_rate, span_ns, take

ALL_MODELS = "*"
LIMIT_MAX = 10**12
MODEL_CHARACTERS = 300
RETRY_CONCURRENT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """None: not limited. A burst is how much may come at once after a pause; None: one minute's worth."""

    owner_kind: str
    owner_id: str
    model: str = ALL_MODELS
    owner_name: str = ""
    requests_per_min: int | None = None
    requests_burst: int | None = None
    tokens_per_min: int | None = None
    tokens_burst: int | None = None
    concurrent: int | None = None

    @property
    def owner(self) -> str:
        name = named(self.owner_kind, self.owner_name, self.owner_id)
        return name if self.model == ALL_MODELS else f"{name} for the model {self.model!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where an ask left one bucket. `meter`: requests or tokens."""

    meter: str
    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What an ask took. `charged`: the rows whose buckets of tokens are corrected when it is settled."""

    standings: tuple[Standing, ...] = ()
    charged: tuple[tuple[str, str, str], ...] = ()

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…`, of the tightest limit of each kind."""
        headers = {}
        for meter in ("requests", "tokens"):
            of_meter = [standing for standing in self.standings if standing.meter == meter]
            if of_meter:
                tightest = min(of_meter, key=lambda standing: standing.remaining)
                headers[f"x-ratelimit-limit-{meter}"] = str(tightest.limit)
                headers[f"x-ratelimit-remaining-{meter}"] = str(tightest.remaining)
                headers[f"x-ratelimit-reset-{meter}"] = f"{tightest.reset_s:.3f}s"
        return headers


def _owned() -> ColumnElement[bool]:
    kinds = [
        and_(limits.c.owner_kind == literal_column(f"'{kind}'"), limits.c.owner_id == bindparam(f"the_{kind}"))
        for kind in OWNER_KINDS
    ]
    return and_(or_(*kinds), limits.c.model.in_((bindparam("the_model"), literal_column(f"'{ALL_MODELS}'"))))


_IN_ORDER = (limits.c.owner_kind, limits.c.owner_id, limits.c.model)  # the order of locks
_SELECT_CHAIN = Statement(select(limits).where(_owned()).order_by(*_IN_ORDER).with_for_update())
_ONE = and_(
    limits.c.owner_kind == bindparam("kind"),
    limits.c.owner_id == bindparam("owner"),
    limits.c.model == bindparam("for_model"),
)
_SELECT_ONE = Statement(select(limits).where(_ONE).with_for_update())
_SELECT_OF = Statement(
    select(limits)
    .where(and_(limits.c.owner_kind == bindparam("kind"), limits.c.owner_id == bindparam("owner")))
    .order_by(limits.c.model)
)
_SELECT_ALL = Statement(select(limits).order_by(*_IN_ORDER))
_SET_DUE = Statement(
    update(limits).where(_ONE).values(requests_due_ns=bindparam("requests_due"), tokens_due_ns=bindparam("tokens_due"))
)
_SET_TOKENS_DUE = Statement(update(limits).where(_ONE).values(tokens_due_ns=bindparam("tokens_due")))
_REMOVE = Statement(limits.delete().where(_ONE))
_UPSERT = upsert(
    limits,
    key=("owner_kind", "owner_id", "model"),
    set=(
        "owner_name",
        "requests_per_min",
        "requests_burst",
        "tokens_per_min",
        "tokens_burst",
        "concurrent",
    ),
)


@cache
def _count_open(column: str, *, of_model: bool) -> Statement:
    where = [literal_column("state = 'open'"), asks.c[column] == bindparam("owner")]  # as the partial index has it
    if of_model:
        where.append(asks.c.model == bindparam("for_model"))
    return Statement(select(func.count().label("open")).select_from(asks).where(and_(*where)))


def pass_limits(owners: Owners, *, tokens: int) -> Transaction[Passed]:
    """Takes one request and `tokens` from every bucket of the chain, or raises and takes nothing.

    Raises: Overloaded, naming the limit, whose it is, and when to try again.
    """
    rows = yield _SELECT_CHAIN(
        the_organisation=owners.organisation,
        the_project=owners.project,
        the_key=owners.key,
        the_process=owners.process,
        the_model=owners.model,
    )
    if not rows:
        return Passed()
    now_ns = _now_ns()
    standings: list[Standing] = []
    charged = []
    for row in rows:
        limit = limit_of(row)
        if limit.concurrent is not None:
            yield from _check_concurrent(limit)
        requests = _take(limit, "requests", row, now_ns, amount=1)
        taken = _take(limit, "tokens", row, now_ns, amount=tokens)
        standings += [standing for _, standing in (requests, taken) if standing is not None]
        if limit.tokens_per_min is not None:
            charged.append((limit.owner_kind, limit.owner_id, limit.model))
        yield _SET_DUE(**_key(limit), requests_due=requests[0], tokens_due=taken[0])
    return Passed(standings=tuple(standings), charged=tuple(charged))


def correct_tokens(charged: tuple[tuple[str, str, str], ...], *, more: int) -> Transaction[None]:
    """An ask used `more` tokens (or less than zero) than it was charged at admission."""
    for kind, owner, model in charged:
        rows = yield _SELECT_ONE(kind=kind, owner=owner, for_model=model)
        if rows and rows[0]["tokens_per_min"]:
            due_ns = rows[0]["tokens_due_ns"] + span_ns(more, rows[0]["tokens_per_min"])
            yield _SET_TOKENS_DUE(kind=kind, owner=owner, for_model=model, tokens_due=min(due_ns, DUE_NS_MAX))


def set_limit(
    owner_kind: str,
    owner_id: str,
    model: str = ALL_MODELS,
    *,
    owner_name: str = "",
    requests_per_min: int | None = None,
    tokens_per_min: int | None = None,
    concurrent: int | None = None,
    requests_burst: int | None = None,
    tokens_burst: int | None = None,
) -> Transaction[Limit]:
    """Sets the whole limit of one owner for one model or all; with nothing but None it is removed. What is in use stays
    in use.

    Raises: InvalidRequest.
    """
    limit = Limit(
        owner_kind=owner_kind,
        owner_id=owner_id,
        model=model,
        owner_name=owner_name,
        requests_per_min=requests_per_min,
        requests_burst=requests_burst,
        tokens_per_min=tokens_per_min,
        tokens_burst=tokens_burst,
        concurrent=concurrent,
    )
    _check(limit)
    if requests_per_min is None and tokens_per_min is None and concurrent is None:
        yield _REMOVE(**_key(limit))
        return limit
    before = yield _SELECT_ONE(**_key(limit))
    yield _UPSERT(
        owner_kind=owner_kind,
        owner_id=owner_id,
        model=model,
        owner_name=owner_name,
        requests_per_min=requests_per_min,
        requests_burst=requests_burst,
        requests_due_ns=0,
        tokens_per_min=tokens_per_min,
        tokens_burst=tokens_burst,
        tokens_due_ns=0,
        concurrent=concurrent,
    )
    for row in before:
        requests_due, tokens_due = (_due_after(limit, meter, row) for meter in ("requests", "tokens"))
        yield _SET_DUE(**_key(limit), requests_due=requests_due, tokens_due=tokens_due)
    return limit


def limits_of(owner_kind: str, owner_id: str) -> Transaction[list[Limit]]:
    rows = yield _SELECT_OF(kind=owner_kind, owner=owner_id)
    return [limit_of(row) for row in rows]


def all_limits() -> Transaction[list[Limit]]:
    rows = yield _SELECT_ALL()
    return [limit_of(row) for row in rows]


def limit_of(row: Row) -> Limit:
    return Limit(
        owner_kind=row["owner_kind"],
        owner_id=row["owner_id"],
        model=row["model"],
        owner_name=row["owner_name"],
        requests_per_min=row["requests_per_min"],
        requests_burst=row["requests_burst"],
        tokens_per_min=row["tokens_per_min"],
        tokens_burst=row["tokens_burst"],
        concurrent=row["concurrent"],
    )


def encode_charged(charged: tuple[tuple[str, str, str], ...]) -> str:
    return msgspec.json.encode(charged).decode()


def decode_charged(text: str) -> tuple[tuple[str, str, str], ...]:
    return msgspec.json.decode(text, type=tuple[tuple[str, str, str], ...])


def _check_concurrent(limit: Limit) -> Transaction[None]:
    assert limit.concurrent is not None
    of_model = limit.model != ALL_MODELS
    values = {"owner": limit.owner_id, **({"for_model": limit.model} if of_model else {})}
    rows = yield _count_open(limit.owner_kind, of_model=of_model)(**values)
    count = int(rows[0]["open"])
    if count >= limit.concurrent:
        raise Overloaded(
            limit="concurrent asks",
            value=limit.concurrent,
            used=count,
            retry_after_s=RETRY_CONCURRENT_S if limit.concurrent else None,
            owner=limit.owner,
        )


def _take(limit: Limit, meter: str, row: Row, now_ns: int, *, amount: int) -> tuple[int, Standing | None]:
    """(the bucket afterwards, where that leaves it). Raises: Overloaded."""
    due_ns = int(row[f"{meter}_due_ns"])
    per_min: int | None = row[f"{meter}_per_min"]
    if per_min is None:
        return due_ns, None
    given: int | None = row[f"{meter}_burst"]
    burst = per_min if given is None else given
    taken: Take = take(due_ns, now_ns, per_min=per_min, burst=burst, amount=amount)
    if taken.due_ns is None:
        raise Overloaded(
            limit=meter, value=per_min, used=taken.used, retry_after_s=taken.retry_after_s, owner=limit.owner
        )
    return taken.due_ns, Standing(meter=meter, limit=per_min, remaining=taken.remaining, reset_s=taken.full_in_s)


def _due_after(limit: Limit, meter: str, row: Row) -> int:
    return at_new_rate(
        int(row[f"{meter}_due_ns"]),
        _now_ns(),
        before_per_min=row[f"{meter}_per_min"],
        per_min=getattr(limit, f"{meter}_per_min"),
        burst=getattr(limit, f"{meter}_burst"),
    )


def _key(limit: Limit) -> dict[str, str]:
    return {"kind": limit.owner_kind, "owner": limit.owner_id, "for_model": limit.model}


def _check(limit: Limit) -> None:
    if limit.owner_kind not in OWNER_KINDS:
        raise InvalidRequest(f"There is no owner {limit.owner_kind[:60]!r}; there are {', '.join(OWNER_KINDS)}.")
    if not limit.owner_id:
        raise InvalidRequest("A limit needs an owner.")
    if not 0 < len(limit.model) <= MODEL_CHARACTERS:
        raise InvalidRequest(f"A limit needs a model's id, of at most {MODEL_CHARACTERS} characters, or *.")
    numbers = {
        "requests_per_min": limit.requests_per_min,
        "requests_burst": limit.requests_burst,
        "tokens_per_min": limit.tokens_per_min,
        "tokens_burst": limit.tokens_burst,
        "concurrent": limit.concurrent,
    }
    for name, number in numbers.items():
        least = 1 if name.endswith("burst") else 0
        if number is not None and not least <= number <= LIMIT_MAX:
            raise InvalidRequest(f"{name} is from {least} to {LIMIT_MAX}, not {number}.", param=name)


def _now_ns() -> int:
    return time.time_ns()
