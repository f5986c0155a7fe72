"""`GET /v1/usage`: what the key of this request has used itself, and what it may still use. Any key may ask; nobody
sees anybody else's here. What an administrator sees of all is in `admin/usage.py`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.api.access import account_of
from nimbos.api.exchange import json_reply
from nimbos.api.query import choice_of, limit_of, only
from nimbos.errors import InvalidRequest
from nimbos.ledger import PAGE_MOST, ROWS, ROWS_MOST, Budget, Span, budgets_of, usage
from nimbos.runtime import Runtime

BY = ("model", "day", "class", "process")
_DIGITS_MAX = 16  # milliseconds, until long after the year 9999


class OwnBudget(msgspec.Struct, kw_only=True):
    """`limit`: None where it only counts. `reserved`: held by asks that run. In tokens, or in millionths of money."""

    meter: str
    period: str
    limit: int | None
    used: int
    reserved: int
    left: int | None

    @classmethod
    def of(cls, budget: Budget) -> OwnBudget:
        left = None if budget.limit is None else max(0, budget.limit - budget.used - budget.reserved)
        return cls(
            meter=budget.meter,
            period=budget.period,
            limit=budget.limit,
            used=budget.used,
            reserved=budget.reserved,
            left=left,
        )


class OwnUsage(msgspec.Struct, kw_only=True):
    """`total`, `rows` and their pages as `nimbos usage --json` has them, of this key alone."""

    key: str
    name: str
    project: str
    total: dict[str, int]
    rows: list[dict[str, int | str]]
    has_more: bool
    next_page: str | None
    budgets: list[OwnBudget]


def routes(runtime: Runtime) -> list[Route]:
    database = runtime.database

    async def get(request: Request) -> Response:
        query = only(request, "by", "since_ms", "until_ms", "limit", "page")
        by = choice_of(query, "by", BY)
        since_ms, until_ms = _at(query.get("since_ms"), "since_ms"), _at(query.get("until_ms"), "until_ms")
        account = account_of(request)
        span = Span(since_ms=since_ms, until_ms=until_ms, filters={"key": (account.key,), "project": (account.id,)})
        limit, page = limit_of(query, default=ROWS, most=ROWS_MOST), _page(query.get("page"))
        body = (await usage(database, by=by, span=span, limit=limit, page=page)).body()
        budgets = await database.run(lambda: budgets_of("key", account.key))
        return json_reply(
            OwnUsage(
                key=account.key,
                name=account.key_name,
                project=account.name,
                total=body["total"],
                rows=body["rows"],
                has_more=body["has_more"],
                next_page=body["next_page"],
                budgets=[OwnBudget.of(budget) for budget in budgets],
            )
        )

    return [Route("/v1/usage", get, methods=["GET"])]


def _at(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        raise InvalidRequest(f"`{name}` must be milliseconds since 1970.", param=name)
    return int(text)


def _page(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX and int(text) <= PAGE_MOST):
        raise InvalidRequest("`page` must be the `next_page` of the page before.", param="page")
    return int(text)
