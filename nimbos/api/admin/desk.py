"""How every route of administration is served: who may, what was sent, what is answered. The routes are in the other
files here, each a method, a path, an action (`accounts/roles.py`) and a function.

Query parameters and fields that are not known are refused by name. What a route changes goes through
`Accounts.change`, which leaves one row in the audit log.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.accounts import Accounts, Action, Actor, Identity, ProjectRole
from nimbos.accounts.people import MEMBER
from nimbos.accounts.roles import check, may
from nimbos.accounts.words import Changed
from nimbos.api import body as bodies
from nimbos.api.access import identity_of
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest

BODY_BYTES_MAX = 1024 * 1024
BODY_STALL_S = 30.0
LIST_MAX = 100
_QUERY_VALUES_MAX = 1000

_INTEGER = re.compile(r"-?[0-9]{1,19}")

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")


class Query:
    """Parameters by name; a list comes as `name[]` or as the name again and again."""

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self._values: dict[str, list[str]] = {}
        for number, (name, value) in enumerate(items):
            if number >= _QUERY_VALUES_MAX:
                raise InvalidRequest(f"There may be {_QUERY_VALUES_MAX} query parameters.")
            self._values.setdefault(name.removesuffix("[]"), []).append(value)
        self._asked: set[str] = set()

    def texts(self, name: str) -> list[str]:
        self._asked.add(name)
        return self._values.get(name, [])

    def text(self, name: str) -> str | None:
        values = self.texts(name)
        if len(values) > 1:
            raise InvalidRequest(f"`{name}` is given {len(values)} times.", param=name)
        return values[0] if values else None

    def one_of(self, name: str, known: tuple[str, ...], *, absent: str) -> str:
        value = self.text(name)
        if value is None:
            return absent
        if value not in known:
            raise InvalidRequest(f"`{name}` is one of {', '.join(known)}, not {value[:60]!r}.", param=name)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.text(name)
        if value is None:
            return None
        if not _INTEGER.fullmatch(value):
            raise InvalidRequest(f"`{name}` is a whole number, not {value[:60]!r}.", param=name)
        if not low <= int(value) <= high:
            raise InvalidRequest(f"`{name}` is {value}; it must be from {low} to {high}.", param=name)
        return int(value)

    def flag(self, name: str) -> bool | None:
        value = self.text(name)
        if value is None:
            return None
        return self.one_of(name, ("true", "false"), absent="false") == "true"

    def check_all_asked(self) -> None:
        """Raises: InvalidRequest for what no one has looked at."""
        unknown = sorted(self._values.keys() - self._asked)
        if unknown:
            name = unknown[0][:100]
            raise InvalidRequest(f"The query parameter {name!r} is not known here.", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, let in. `in_project`: what the caller is in the project of the path."""

    request: Request
    identity: Identity
    actor: Actor
    accounts: Accounts
    path: dict[str, str]
    query: Query
    content: bytes
    in_project: ProjectRole | None

    def body(self, into: type[S], *, refused: dict[str, str] | None = None) -> S:
        return bodies.decode(self.content, into, refused=refused)

    def check_no_body(self) -> None:
        """Raises: InvalidRequest for a body where nothing is read."""
        if self.content.strip() not in (b"", b"{}"):
            raise InvalidRequest("This route takes no body.")

    def may(self, action: Action) -> bool:
        return may(self.identity.role, action, in_project=self.in_project)

    def check(self, action: Action) -> None:
        """Raises: Forbidden."""
        check(self.identity.role, action, in_project=self.in_project)

    async def change(self, begin: Callable[[], Transaction[Changed[T]]]) -> T:
        return await self.accounts.change(self.actor, begin)

    async def read(self, begin: Callable[[], Transaction[T]]) -> T:
        return await self.accounts.read(begin)


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminRoute:
    method: str
    path: str
    action: Action
    handle: Handler


def get(path: str, action: Action, handle: Handler) -> AdminRoute:
    return AdminRoute(method="GET", path=path, action=action, handle=handle)


def post(path: str, action: Action, handle: Handler) -> AdminRoute:
    return AdminRoute(method="POST", path=path, action=action, handle=handle)


def remove(path: str, action: Action, handle: Handler) -> AdminRoute:
    return AdminRoute(method="DELETE", path=path, action=action, handle=handle)


def served(route: AdminRoute, accounts: Accounts) -> Route:
    """The route for the app."""

    async def endpoint(request: Request) -> Response:
        identity = identity_of(request)
        in_project = await _in_project(accounts, identity, request.path_params.get("project_id"))
        check(identity.role, route.action, in_project=in_project)
        content = await bodies.read(request, limit_bytes=BODY_BYTES_MAX, stall_s=BODY_STALL_S)
        query = Query(request.query_params.multi_items())
        address = request.client.host if request.client is not None else ""
        call = Call(
            request=request,
            identity=identity,
            actor=replace(identity.actor, address=address),
            accounts=accounts,
            path=request.path_params,
            query=query,
            content=content,
            in_project=in_project,
        )
        if route.method != "POST":
            call.check_no_body()
        if route.method != "GET":
            query.check_all_asked()  # before anything is changed
        reply = await route.handle(call)
        query.check_all_asked()
        return reply if isinstance(reply, Response) else answer(reply)

    return Route(route.path, endpoint, methods=[route.method])


def answer(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _in_project(accounts: Accounts, identity: Identity, project_id: str | None) -> ProjectRole | None:
    """What the user behind a key or a log-in is there; None for nobody, and for programs."""
    user = identity.actor.user
    if project_id is None or not user:
        return None
    rows = await accounts.database.read(MEMBER(project=project_id, user=user))
    return ProjectRole(rows[0]["role"]) if rows else None


# --- lists


class Page(msgspec.Struct, kw_only=True):
    """OpenAI's page: `after=last_id` brings the next."""

    object: str = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which part of a list is wanted."""

    after: str
    limit: int

    @classmethod
    def of(cls, query: Query, *, default: int = 20) -> Window:
        limit = query.integer("limit", 1, LIST_MAX)
        return cls(after=query.text("after") or "", limit=default if limit is None else limit)

    def page(self, found: list[Any]) -> Page:
        """Of one element more than `limit`, if there are so many."""
        shown = found[: self.limit]
        return Page(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(found) > self.limit,
        )


def seconds(at_ms: int | None) -> int | None:
    return None if at_ms is None else at_ms // 1000
