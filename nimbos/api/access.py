"""Who may come in: sizes of headers, `Host`, `Origin`, then the key. A plain ASGI layer around every route.

`Host` and `Origin` are checked because a page in a browser can reach loopback: by a name it made to point there
(DNS rebinding) or across sites. `/health` needs no key and says only ready or not.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimbos.api import errors
from nimbos.config import ServerSettings
from nimbos.errors import Forbidden, InvalidRequest, NimbosError
from nimbos.keys import ADMIN, Keys
from nimbos.types import Account

_KEYLESS = frozenset({"/health"})
_ADMIN_ONLY = ("/metrics", "/v1/organization")


class HeadersTooLarge(NimbosError):
    code = "headers_too_large"
    status = 431
    kind = "invalid_request_error"


def account_of(request: Request) -> Account:
    """The account that `Access` let in."""
    account = request.scope["nimbos.account"]
    assert isinstance(account, Account)
    return account


class Access:
    def __init__(self, app: ASGIApp, *, settings: ServerSettings, keys: Keys) -> None:
        self._app = app
        self._keys = keys
        self._header_limit_bytes = settings.max_header_bytes
        self._hosts = frozenset(_bare_host(host) for host in (settings.host, *settings.allow_hosts))
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            origin = self._check(scope, headers)
            send = _with_origin(send, origin) if origin is not None else send
            if origin is not None and scope["method"] == "OPTIONS":
                await _preflight()(scope, receive, send)
                return
            self._admit(scope, headers)
        except NimbosError as error:
            await errors.response_to(error, errors.shape_of(scope))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> str | None:
        """The request's allowed origin, if it has one."""
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > self._header_limit_bytes:
            raise HeadersTooLarge(f"The headers may have at most {self._header_limit_bytes} bytes.")
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise InvalidRequest("The request must have one `Host` header.")
        server = scope.get("server")
        if not self._is_ours(_bare_host(hosts[0]), server[0] if server else None):
            raise Forbidden(f"The host {hosts[0][:200]!r} is not allowed; start with `--allow-host` to allow it.")
        origin = headers.get("origin")
        if origin is None:
            return None
        if origin.lower() not in self._origins and not self._is_our_origin(origin, server[0] if server else None):
            raise Forbidden(f"The origin {origin[:200]!r} is not allowed; start with `--allow-origin` to allow it.")
        return origin

    def _is_our_origin(self, origin: str, server: str | None) -> bool:
        try:
            host = urlsplit(origin).hostname
        except ValueError:
            return False
        return host is not None and self._is_ours(host.lower(), server)

    def _is_ours(self, host: str, server: str | None) -> bool:
        """Loopback, an allowed name, or the very address this connection came in at."""
        return bool(host) and (host in self._hosts or is_loopback(host) or host == server)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        path: str = scope["path"]
        if path in _KEYLESS:
            return
        secret = headers.get("x-api-key")  # Anthropic's clients
        authorization = headers.get("authorization") or (f"Bearer {secret}" if secret is not None else None)
        account = self._keys.authenticate(authorization)
        if path.startswith(_ADMIN_ONLY) and ADMIN not in account.scopes:
            raise Forbidden(f"This key does not have the scope {ADMIN!r}, which {path} needs.")
        scope["nimbos.account"] = account


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bare_host(host: str) -> str:
    """`[::1]:8000` → `::1`; the port says nothing about who asks."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0].rstrip(".")


def _with_origin(send: Send, origin: str) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = "x-nimbos-ask-id, x-nimbos-class, retry-after"
            headers.add_vary_header("origin")
        await send(message)

    return marked


def _preflight() -> Response:
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": "*, authorization, content-type",
            "access-control-max-age": "600",
        },
    )
