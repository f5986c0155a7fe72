"""`/v1/organization/usage/…` and `/v1/organization/costs` in OpenAI's buckets, and our own report for `nimbos usage`.

Every ask is in exactly one of completions, embeddings and moderations (`kinds.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
from sqlalchemy import bindparam, select
from starlette.responses import Response, StreamingResponse

from nimbos.accounts import Action
from nimbos.accounts.words import OWNER_KEY, OWNER_USER
from nimbos.api.admin.desk import AdminRoute, Call, Query, get
from nimbos.api.admin.kinds import Kind, Kinds
from nimbos.api.admin.names import names_of
from nimbos.db import Database, Statement
from nimbos.db.tables.accounts import api_keys
from nimbos.errors import InvalidRequest
from nimbos.ledger import PAGE_MOST, ROWS, ROWS_MOST, Span, UsageRow, Used, export_asks, usage, usage_buckets
from nimbos.types import AskClass

USAGE = "/v1/organization/usage"
COSTS = "/v1/organization/costs"
Width = Literal["1m", "1h", "1d"]

_WIDTH_S: dict[str, int] = {"1m": 60, "1h": 3600, "1d": 86_400}
BUCKETS: dict[str, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}  # default, most
COST_BUCKETS = (7, 180)
_SECONDS_MAX = 2**40
TOKEN_GROUPS = ("project_id", "user_id", "api_key_id", "model")
COMPLETION_GROUPS = ("batch", "service_tier", "api_source")  # besides those
COST_GROUPS = ("project_id", "user_id", "line_item", "api_key_id", "api_source")
_GROUPS = {"project_id": "project", "api_key_id": "key", "model": "model", "service_tier": "class", "batch": "class"}
EMPTY: dict[str, tuple[str, ...]] = {
    "images": ("project_id", "user_id", "api_key_id", "model", "size", "source"),
    "audio_speeches": ("project_id", "user_id", "api_key_id", "model"),
    "audio_transcriptions": ("project_id", "user_id", "api_key_id", "model"),
    "vector_stores": ("project_id",),
    "code_interpreter_sessions": ("project_id",),
    "file_search_calls": ("project_id", "user_id", "api_key_id", "vector_store_id"),
    "web_search_calls": ("project_id", "user_id", "api_key_id", "model", "context_level", "api_source"),
    "decisions": ("project_id", "user_id", "api_key_id", "model", "batch", "service_tier"),
}
_TIERS = {AskClass.INTERACTIVE: "priority", AskClass.AGENT: "default", AskClass.BATCH: "flex"}
_USER_OF = Statement(
    select(api_keys.c.owner_id).where(api_keys.c.id == bindparam("key"), api_keys.c.owner_kind == "user")
)


class Bucket(msgspec.Struct, kw_only=True):
    object: str = "bucket"
    start_time: int
    end_time: int
    results: list[dict[str, Any]]


class Buckets(msgspec.Struct, kw_only=True):
    object: str = "page"
    data: list[Bucket]
    has_more: bool
    next_page: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The buckets of one page: `[start_s, end_s)` in steps of `width`, and whether more follow."""

    width: Width
    start_s: int
    end_s: int
    has_more: bool

    @classmethod
    def of(cls, query: Query, widths: tuple[str, ...], limits: dict[str, tuple[int, int]]) -> Frame:
        start = query.integer("start_time", 0, _SECONDS_MAX)
        if start is None:
            raise InvalidRequest("`start_time` is needed, in seconds since 1970.", param="start_time")
        width: Any = query.one_of("bucket_width", widths, absent="1d")
        default, most = limits[width]
        limit = query.integer("limit", 1, most) or default
        end = query.integer("end_time", 0, _SECONDS_MAX)
        end = int(time.time()) + 1 if end is None else end
        page = query.integer("page", 0, _SECONDS_MAX)
        step = _WIDTH_S[width]
        first = max(start, page or 0) // step * step
        last = max(first, -(-end // step) * step)
        return cls(
            width=width, start_s=first, end_s=min(last, first + limit * step), has_more=first + limit * step < last
        )

    def buckets(self, results: dict[int, list[dict[str, Any]]]) -> Buckets:
        step = _WIDTH_S[self.width]
        data = [
            Bucket(start_time=start, end_time=start + step, results=results.get(start, []))
            for start in range(self.start_s, self.end_s, step)
        ]
        return Buckets(data=data, has_more=self.has_more, next_page=str(self.end_s) if self.has_more else None)


async def tokens(kind: Kind, call: Call) -> Buckets:
    frame = Frame.of(call.query, ("1m", "1h", "1d"), BUCKETS)
    groups = _groups(call.query, (*TOKEN_GROUPS, *(COMPLETION_GROUPS if kind == "completions" else ())))
    span = await _span(call, frame, batch=call.query.flag("batch") if kind == "completions" else None)
    users = set(call.query.texts("user_ids"))
    results: dict[int, list[dict[str, Any]]] = {}
    for group, used in (await _rows(call, frame, span, groups, kind, users)).items():
        start_s, *values = group
        results.setdefault(int(start_s), []).append(_tokens_result(kind, dict(values), used))
    return frame.buckets(results)


async def costs(call: Call) -> Buckets:
    frame = Frame.of(call.query, ("1d",), {"1d": COST_BUCKETS})
    groups = _groups(call.query, COST_GROUPS)
    span = await _span(call, frame, batch=None, models=call.query.texts("line_items"))
    results: dict[int, list[dict[str, Any]]] = {}
    for group, used in (await _rows(call, frame, span, groups, None, set())).items():
        start_s, *values = group
        amount = {"value": used.cost_micros / 1_000_000, "currency": "usd"}
        extension = {"cost_micros": used.cost_micros}
        result = {"object": "organization.costs.result", "amount": amount, **dict(values), "x_nimbos": extension}
        results.setdefault(int(start_s), []).append(result)
    return frame.buckets(results)


async def nothing(name: str, call: Call) -> Buckets:
    """What no model here does yet: its parameters are checked, its buckets are empty."""
    frame = Frame.of(call.query, ("1m", "1h", "1d"), BUCKETS)
    _groups(call.query, EMPTY[name])
    for filters in ("api_key_ids", "project_ids", "user_ids", "models", "batch", "sizes", "sources"):
        call.query.texts(filters)
    for filters in ("vector_store_ids", "context_levels"):
        call.query.texts(filters)
    return frame.buckets({})


async def report(call: Call) -> dict[str, Any]:
    """`{"total": …, "rows": […], …}`, with names beside the ids of keys and projects."""
    by = call.query.text("by") or "key"
    since, until = call.query.integer("since_ms", 0, 2**62), call.query.integer("until_ms", 0, 2**62)
    filters = {
        name: values for name in ("project", "key", "model", "class", "process") if (values := call.query.texts(name))
    }
    limit, page = call.query.integer("limit", 1, ROWS_MOST) or ROWS, call.query.integer("page", 0, PAGE_MOST) or 0
    span = Span(since_ms=since, until_ms=until, filters=filters)
    body = (await usage(call.accounts.database, by=by, span=span, limit=limit, page=page)).body()
    if by in ("key", "project"):
        names = await names_of(call.accounts.database, by, [row[by] for row in body["rows"]])
        body["rows"] = [{by: row[by], "name": names.get(row[by], ""), **row} for row in body["rows"]]
    return body


async def export(call: Call) -> Response:
    """Every settled ask, streamed."""
    form: Any = call.query.one_of("format", ("csv", "json"), absent="csv")
    since, until = call.query.integer("since_ms", 0, 2**62), call.query.integer("until_ms", 0, 2**62)
    lines = export_asks(call.accounts.database, form, since_ms=since, until_ms=until)
    media_type = "text/csv; charset=utf-8" if form == "csv" else "application/jsonl"
    return StreamingResponse(lines, media_type=media_type)


async def _span(call: Call, frame: Frame, *, batch: bool | None, models: Sequence[str] = ()) -> Span:
    filters: dict[str, Sequence[str]] = {}
    for name, dimension in (("project_ids", "project"), ("api_key_ids", "key"), ("models", "model")):
        if call.query.texts(name):
            filters[dimension] = call.query.texts(name)
    if models:
        filters["model"] = models
    if batch is not None:
        filters["class"] = [AskClass.BATCH] if batch else [one for one in AskClass if one is not AskClass.BATCH]
    return Span(since_ms=frame.start_s * 1000, until_ms=frame.end_s * 1000, filters=filters)


async def _rows(
    call: Call, frame: Frame, span: Span, groups: tuple[str, ...], kind: Kind | None, users: set[str]
) -> dict[tuple[Any, ...], Used]:
    """By (start, (name, value)…): the ledger's rows, those of another kind left out, in the groups that were asked."""
    database = call.accounts.database
    wanted = {_GROUPS[group] for group in groups if group in _GROUPS}
    wanted |= {"model"} if kind is not None or "line_item" in groups else set()
    wanted |= {"key"} if users or "user_id" in groups else set()
    dimensions = tuple(sorted(wanted))
    owners = _Users(database)
    kinds = Kinds(database, width_ms=_WIDTH_S[frame.width] * 1000)
    found: dict[tuple[Any, ...], Used] = {}
    for row in await usage_buckets(database, width=frame.width, span=span, group_by=dimensions):
        values = dict(zip(dimensions, row.group, strict=True))
        if kind is not None and await kinds.of(values["model"], row.start_ms) != kind:
            continue
        user = await owners.of(values["key"]) if "key" in values else None
        if users and user not in users:
            continue
        group = (row.start_ms // 1000, *((name, _value(name, values, user)) for name in groups))
        _sum(found.setdefault(group, Used()), row)
    return found


def _value(name: str, values: dict[str, str], user: str | None) -> Any:
    if name == "user_id":
        return user
    if name == "line_item":
        return values["model"]
    if name == "api_source":
        return "unlabeled"
    if name == "batch":
        return values["class"] == AskClass.BATCH
    if name == "service_tier":
        return _TIERS[AskClass(values["class"])]
    return values[_GROUPS[name]]


def _sum(into: Used, row: UsageRow) -> None:
    into.asks += row.used.asks
    into.input_tokens += row.used.input_tokens
    into.cached_tokens += row.used.cached_tokens
    into.output_tokens += row.used.output_tokens
    into.thinking_tokens += row.used.thinking_tokens
    into.cost_micros += row.used.cost_micros


def _tokens_result(kind: Kind, values: dict[str, Any], used: Used) -> dict[str, Any]:
    result = {
        "object": f"organization.usage.{kind}.result",
        "input_tokens": used.input_tokens,
        "num_model_requests": used.asks,
        **dict.fromkeys(("project_id", "user_id", "api_key_id", "model")),
        **values,
    }
    if kind == "completions":
        result |= {
            "output_tokens": used.output_tokens,
            "input_cached_tokens": used.cached_tokens,
            "input_uncached_tokens": used.input_tokens - used.cached_tokens,
            "x_nimbos": {"thinking_tokens": used.thinking_tokens, "cost_micros": used.cost_micros},
        }
    return result


def _groups(query: Query, known: tuple[str, ...]) -> tuple[str, ...]:
    groups = tuple(dict.fromkeys(query.texts("group_by")))
    for group in groups:
        if group not in known:
            raise InvalidRequest(f"`group_by` is of {', '.join(known)}, not {group[:60]!r}.", param="group_by")
    return groups


class _Users:
    """Whose key it is; None for a service account's."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, str | None] = {OWNER_KEY: OWNER_USER}

    async def of(self, key: str) -> str | None:
        if key not in self._known:
            rows = await self._database.read(_USER_OF(key=key))
            self._known[key] = rows[0]["owner_id"] if rows else None
        return self._known[key]


def routes() -> list[AdminRoute]:
    kinds: tuple[Kind, ...] = ("completions", "embeddings", "moderations")
    return [
        get(USAGE, Action.SEE, report),
        get(f"{USAGE}/asks", Action.SEE, export),
        get(COSTS, Action.SEE, costs),
        *(get(f"{USAGE}/{kind}", Action.SEE, partial(tokens, kind)) for kind in kinds),
        *(get(f"{USAGE}/{name}", Action.SEE, partial(nothing, name)) for name in EMPTY),
    ]
