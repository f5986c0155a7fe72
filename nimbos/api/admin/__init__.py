"""Administration over HTTP: OpenAI's Admin API as its official client drives it, and what it has no words for.

`routes` are for the server's app. `app` serves the same to a command that reads the database itself.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nimbos.accounts import Accounts, Identity
from nimbos.api import errors
from nimbos.api.admin import (
    admin_keys,
    allowances,
    audit,
    console,
    keys,
    prices,
    programs,
    projects,
    rates,
    spend_alerts,
    spending,
    usage,
    users,
)
from nimbos.api.admin.desk import AdminRoute, served


def admin_routes() -> list[AdminRoute]:
    who = (projects, users, keys, programs, admin_keys)
    what = (allowances, rates, spending, spend_alerts, prices, usage, audit, console)
    return [route for part in (*who, *what) for route in part.routes()]


def routes(accounts: Accounts) -> list[Route]:
    return [*(served(route, accounts) for route in admin_routes()), *console.login_routes(accounts)]


def app(accounts: Accounts, identity: Identity) -> Starlette:
    """For callers in this process, all of whom are `identity`; nothing is checked and nothing listens."""
    return Starlette(
        routes=routes(accounts),
        middleware=[Middleware(errors.LastResort, shapes=errors.Shapes()), Middleware(_As, identity=identity)],
        exception_handlers=errors.handlers(),
    )


class _As:
    def __init__(self, app: ASGIApp, *, identity: Identity) -> None:
        self._app = app
        self._identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["nimbos.identity"] = self._identity
        await self._app(scope, receive, send)
