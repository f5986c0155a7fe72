"""Who may come in: sizes of headers, `Host`, `Origin`, then the key and what it is for. A plain ASGI layer around every
route.

`Host` and `Origin` are checked because a page in a browser can reach loopback: by a name it made to point there
(DNS rebinding) or across sites. `/health` needs no key and says only ready or not. A key comes as
`Authorization: Bearer` or `x-api-key`; people who logged in to the console come with a cookie, for administration
alone, and what they change must come from a page of this very origin.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimbos.accounts import Accounts, Action, Identity, allowed_route
from nimbos.accounts.roles import check
from nimbos.api import errors
from nimbos.config import ServerSettings
from nimbos.errors import Forbidden, InvalidRequest, NimbosError, Unauthorized
from nimbos.presence import is_loopback
from nimbos.types import Account

LOGIN = "/v1/console/login"
_KEYLESS = frozenset({"/health", LOGIN})
_SEEN = frozenset({"/metrics", "/v1/organization/live"})  # of the whole organisation; the rest asks in `admin/desk.py`
_ADMIN_ONLY = ("/metrics", "/v1/organization", "/v1/console")
_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class HeadersTooLarge(NimbosError):
    code = "headers_too_large"
    status = 431
    kind = "invalid_request_error"


def account_of(request: Request) -> Account:
    """The account that `Access` let in."""
    return identity_of(request).account


def identity_of(request: Request) -> Identity:
    """Who `Access` let in, and what it may administer."""
    identity = request.scope["nimbos.identity"]
    assert isinstance(identity, Identity)
    return identity


def cookie_name(scope: Scope) -> str:
    """Over TLS the browser itself holds the cookie to this host and path."""
    return "__Host-nimbos_session" if scope.get("scheme") == "https" else "nimbos_session"


def session_token(scope: Scope) -> str | None:
    wanted = cookie_name(scope)
    for header in Headers(scope=scope).getlist("cookie"):
        for part in header.split(";"):
            name, _, value = part.strip().partition("=")
            if name == wanted and value:
                return value
    return None


class Access:
    """Trusts an identity that is in the scope already: only an app around this one can have put it there."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, accounts: Accounts) -> None:
        self._app = app
        self._accounts = accounts
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
            await self._admit(scope, headers)
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

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        path: str = scope["path"]
        if path == LOGIN and "origin" in headers and not self._is_same_origin(headers):
            raise Forbidden("A log-in must come from a page of this server itself.")
        if path in _KEYLESS:
            return
        identity = scope.get("nimbos.identity") or await self._identify(scope, headers)
        if _is_admin(path):
            if identity.role is None:
                raise Forbidden(f"This key does not have the scope 'admin', which {path[:200]} needs.")
            if path in _SEEN:
                check(identity.role, Action.SEE)
        elif not allowed_route(identity.account, path):
            raise Forbidden(f"This key is not for the route {path[:200]}.")
        scope["nimbos.identity"] = identity
        scope["nimbos.account"] = identity.account

    async def _identify(self, scope: Scope, headers: Headers) -> Identity:
        secret = _secret_of(headers)
        if secret is not None:
            client = scope.get("client")
            return await self._accounts.authenticate(secret, address=client[0] if client else "")
        token = session_token(scope)
        if token is None:
            raise Unauthorized("There is no key in this request. Send the header `Authorization: Bearer YOUR_KEY`.")
        if not _is_admin(scope["path"]):
            raise Unauthorized("A log-in is for administration; this route needs a key.")
        if scope["method"] not in _READS and not self._is_same_origin(headers):
            raise Forbidden("A change with a log-in's cookie must come from a page of this server itself.")
        return await self._accounts.session(token)

    def _is_same_origin(self, headers: Headers) -> bool:
        """To the port: another program's page on this machine is another origin."""
        origin = headers.get("origin")
        if origin is None:
            return False
        return origin.lower() in self._origins or _place_of(origin) == headers.get("host", "").strip().lower()


def _secret_of(headers: Headers) -> str | None:
    """`Authorization` goes before `x-api-key`. Raises: Unauthorized for a header of another form."""
    header = headers.get("authorization")
    if header is None:
        return headers.get("x-api-key", "").strip() or None
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized("The header `Authorization` is not of the form `Bearer YOUR_KEY`.")
    return secret.strip()


def _is_admin(path: str) -> bool:
    return any(path == route or path.startswith(f"{route}/") for route in _ADMIN_ONLY)


def _place_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


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
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": "*, authorization, content-type",
            "access-control-max-age": "600",
        },
    )
