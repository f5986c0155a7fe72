"""Query parameters of the Responses routes, and pages of items. An unknown parameter is refused, like a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from nimbos.api.responses_items import Item, restored
from nimbos.api.responses_request import INCLUDES
from nimbos.api.responses_wire import Page
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.responses import Placed, Store

LIMIT_MAX = 100
_LIMIT = 20
_INCLUDE = ("include", "include[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    stream: bool
    starting_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    after: str | None
    limit: int
    descending: bool


def check_query(request: Request, *known: str) -> None:
    """`include` may name what could be included; it is there anyway. Raises: UnsupportedField, InvalidRequest."""
    for name, value in request.query_params.multi_items():
        if name in _INCLUDE and "include" in known:
            if value not in INCLUDES:
                raise InvalidRequest(f"`include` names {value[:60]!r}, which is not known.", param="include")
        elif name not in known:
            raise UnsupportedField(name[:60], why="unknown in the query")


def retrieval(request: Request) -> Retrieval:
    """Raises: InvalidRequest, UnsupportedField."""
    check_query(request, "include", "stream", "starting_after", "include_obfuscation")
    stream = request.query_params.get("stream", "false")
    if stream not in ("true", "false"):
        raise InvalidRequest("`stream` must be true or false.", param="stream")
    after = request.query_params.get("starting_after")
    if after is not None and stream != "true":
        raise InvalidRequest("`starting_after` is only allowed with `stream=true`.", param="starting_after")
    return Retrieval(stream=stream == "true", starting_after=-1 if after is None else _number(after, "starting_after"))


def paging(request: Request) -> Paging:
    """Raises: InvalidRequest, UnsupportedField."""
    check_query(request, "include", "after", "limit", "order")
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be asc or desc.", param="order")
    limit = _number(request.query_params.get("limit", str(_LIMIT)), "limit")
    if not 1 <= limit <= LIMIT_MAX:
        raise InvalidRequest(f"`limit` is {limit}; it must be from 1 to {LIMIT_MAX}.", param="limit")
    return Paging(after=request.query_params.get("after"), limit=limit, descending=order == "desc")


async def page_of(store: Store, account: str, placed: Sequence[Placed], wanted: Paging) -> Page:
    """Only the page's own items are read. Raises: InvalidRequest for an `after` that is not there."""
    ordered = list(reversed(placed)) if wanted.descending else list(placed)
    start = 0
    if wanted.after is not None:
        start = next((number + 1 for number, one in enumerate(ordered) if one.id == wanted.after), -1)
        if start < 0:
            raise InvalidRequest(f"`after` names {wanted.after[:80]!r}, which is not in the list.", param="after")
    shown = ordered[start : start + wanted.limit]
    items = [restored(piece.id, piece.content) for piece in await store.pieces(account, shown)]
    return listed(items, has_more=start + wanted.limit < len(ordered))


def listed(items: list[Item], *, has_more: bool) -> Page:
    ids = [item["id"] for item in items]
    return Page(data=items, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)


def _number(given: str, name: str) -> int:
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise InvalidRequest(f"`{name}` must be a whole number.", param=name)
    return int(given)
