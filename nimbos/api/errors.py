"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, with the headers its clients obey."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimbos.errors import (
    BudgetExhausted,
    DownloadFailed,
    EngineFailed,
    InvalidRequest,
    NimbosError,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    StorageUnavailable,
)

_SHOWN_CHARACTERS = 200  # of a path, in an error

_log = structlog.get_logger(__name__)


class ErrorDetail(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


def body_of(error: NimbosError) -> bytes:
    detail = ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code)
    return msgspec.json.encode(ErrorBody(detail))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a dialect writes an error; for every path that begins with one of `prefixes`. `headers`: more of them, asked
    for after the body. `client_header`: a request that has it wants this shape on any path."""

    prefixes: tuple[str, ...]
    body: Callable[[NimbosError], bytes]
    headers: Callable[[NimbosError], dict[str, str]] = field(default=lambda _: {})
    client_header: str | None = None


OPENAI = Shape(prefixes=("/",), body=body_of)


class Shapes:
    """The dialects' shapes by path. Kept in the scope of every request, so that whoever refuses it finds it."""

    def __init__(self, shapes: Iterable[Shape] = ()) -> None:
        known = (*shapes, OPENAI)
        self._by_prefix = sorted(
            ((prefix, shape) for shape in known for prefix in shape.prefixes), key=lambda pair: -len(pair[0])
        )
        self._by_header = [(shape.client_header.encode(), shape) for shape in known if shape.client_header is not None]

    def of(self, scope: Scope) -> Shape:
        """The shape that the client's own header asks for, else that of the longest prefix of the path."""
        names = {name for name, _ in scope["headers"]}
        for header, shape in self._by_header:
            if header in names:
                return shape
        path: str = scope["path"]
        return next((shape for prefix, shape in self._by_prefix if path.startswith(prefix)), OPENAI)


def shape_of(scope: Scope) -> Shape:
    """The shape that `LastResort` chose for this request."""
    shape = scope.get("nimbos.shape")
    return shape if isinstance(shape, Shape) else OPENAI


def response_to(error: NimbosError, shape: Shape = OPENAI) -> Response:
    return Response(
        shape.body(error),
        status_code=error.status,
        headers={**headers_of(error), **shape.headers(error)},
        media_type="application/json",
    )


def headers_of(error: NimbosError) -> dict[str, str]:
    """`x-should-retry` tells the official clients whether trying again can help."""
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        seconds = max(1, math.ceil(error.retry_after_s))
        meter = "tokens" if error.limit == "tokens" else "requests"
        return {
            "retry-after": str(seconds),
            "x-should-retry": "true",
            f"x-ratelimit-limit-{meter}": str(error.value),
            f"x-ratelimit-remaining-{meter}": str(max(0, error.value - error.used)),
            f"x-ratelimit-reset-{meter}": f"{seconds}s",
        }
    if isinstance(error, BudgetExhausted):
        if error.retry_after_s is None:
            return {"x-should-retry": "false"}
        return {"x-should-retry": "false", "retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, NotReady | StorageUnavailable):
        return {"retry-after": "1", "x-should-retry": "true"}
    if isinstance(error, EngineFailed | DownloadFailed):
        return {"x-should-retry": "true"}
    if isinstance(error, PayloadTooLarge):
        return {"connection": "close", "x-should-retry": "false"}
    return {"x-should-retry": "false"}


def internal(request_path: str, error: BaseException) -> NimbosError:
    """Our own bug: logged with its place in the code, never with its text, which may hold a prompt."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    _log.error("request.failed", path=request_path, error=type(error).__name__, frames=frames[-12:])
    return NimbosError("Nimbos failed inside; the server's log says where. Please report it.")


def handlers() -> Mapping[Any, Callable[[Request, Any], Any]]:
    async def known(request: Request, error: NimbosError) -> Response:
        return response_to(error, shape_of(request.scope))

    async def http(request: Request, error: HTTPException) -> Response:
        return _plain(request, error)

    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    return {NimbosError: known, HTTPException: http, ClientDisconnect: gone}


class LastResort:
    """The top of every request: a bug of ours fails that request alone, with an answer if none had begun."""

    def __init__(self, app: ASGIApp, *, shapes: Shapes) -> None:
        self._app = app
        self._shapes = shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["nimbos.shape"] = self._shapes.of(scope)
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            failure = internal(scope["path"], error)
            if not begun:
                await response_to(failure, shape_of(scope))(scope, receive, send)
            elif (abort := scope.get("nimbos.abort")) is not None:
                abort()


class NoRoute(NimbosError):
    code = "not_found"
    status = 404
    kind = "invalid_request_error"


class MethodNotAllowed(NimbosError):
    code = "method_not_allowed"
    status = 405
    kind = "invalid_request_error"


def _plain(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such route, no such method."""
    path = request.url.path[:_SHOWN_CHARACTERS]
    failure: NimbosError
    if error.status_code == 404:
        failure = NoRoute(f"There is no route {request.method} {path} here.")
    elif error.status_code == 405:
        failure = MethodNotAllowed(f"{request.method} is not allowed for {path}.")
    else:
        failure = InvalidRequest(str(error.detail))
    reply = response_to(failure, shape_of(request.scope))
    reply.status_code = error.status_code
    reply.headers.update(error.headers or {})
    return reply
