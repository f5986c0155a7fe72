"""What is written of each request: one line in the access log, and a span where traces are wanted.

Ids, counts and durations; of a path only the route it matched, so that no id or name of a client's stands there. Never
a query, a body, a header's value or a key.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimbos.types import Account

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from nimbos.telemetry import Telemetry

_log = structlog.get_logger(__name__)

_UNMATCHED = "(none)"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observing:
    """Outermost layer: sees every request, also those that are refused. `routes` tell which pattern a path matched."""

    def __init__(self, app: ASGIApp, *, routes: list[Route], telemetry: Telemetry | None) -> None:
        self._app = app
        self._routes = routes
        self._exact = {route.path: route.path for route in routes if "{" not in route.path}
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen()
        span = self._begin_span(scope) if self._telemetry is not None else None

        async def watched(message: Message) -> None:
            seen.note(message)
            await send(message)

        started = time.perf_counter()
        try:
            if span is None:
                await self._app(scope, receive, watched)
            else:
                from opentelemetry.trace import use_span

                with use_span(span, record_exception=False):
                    await self._app(scope, receive, watched)
        finally:
            self._write(scope, seen, time.perf_counter() - started)
            if span is not None:
                _end_span(span, seen)

    def _write(self, scope: Scope, seen: _Seen, seconds: float) -> None:
        given = scope.get("nimbos.account")
        account = given if isinstance(given, Account) else None
        _log.info(
            "http.request",
            method=_method(scope),
            route=self._route(scope),
            status=seen.status,
            ask=seen.ask_id,
            account=account.id if account is not None else None,
            key=account.key if account is not None else None,
            bytes=seen.sent_bytes,
            complete=seen.complete,
            ms=round(seconds * 1e3, 2),
        )

    def _route(self, scope: Scope) -> str:
        exact = self._exact.get(scope["path"])
        if exact is not None:
            return exact
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                return route.path
        return _UNMATCHED

    def _begin_span(self, scope: Scope) -> Span:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        assert self._telemetry is not None
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        route, method = self._route(scope), _method(scope)
        return self._telemetry.tracer.start_span(
            f"{method} {route}",
            context=extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route, "url.scheme": scope["scheme"]},
        )


class _Seen:
    """What went out. `complete`: the last byte was sent; False means that the client left first."""

    __slots__ = ("ask_id", "complete", "sent_bytes", "status")

    def __init__(self) -> None:
        self.status = 0
        self.sent_bytes = 0
        self.complete = False
        self.ask_id: str | None = None

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name, value in message.get("headers", ()):
                if name == b"x-nimbos-ask-id":
                    self.ask_id = value.decode("latin-1")
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)


def _end_span(span: Span, seen: _Seen) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("http.response.status_code", seen.status)
    if seen.ask_id is not None:
        span.set_attribute("nimbos.ask.id", seen.ask_id)
    if seen.status >= 500 or seen.status == 0:
        span.set_attribute("error.type", str(seen.status or "gone"))
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in _METHODS else "_OTHER"
