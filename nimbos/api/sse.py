"""Server-sent events, and who watches the client meanwhile.

Closing the events' iterator is how an ask is cancelled, so it is closed in every case: all sent, client gone, client
too slow, server shutting down. A comment is sent after a silence, so that proxies keep the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nimbos.api import errors
from nimbos.errors import NimbosError

_log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_ENDS_OF_LINES = ((b"\xc2\x85", rb"\u0085"), (b"\xe2\x80\xa8", rb"\u2028"), (b"\xe2\x80\xa9", rb"\u2029"))

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """How a dialect writes a stream. `keep_alive`: sent after a silence; None where the format has no comment.
    `error`: a failure in the middle of the stream."""

    media_type: str = "text/event-stream"
    keep_alive: bytes | None = _KEEP_ALIVE
    error: Callable[[NimbosError], bytes] = field(default=lambda error: b"data: " + errors.body_of(error) + b"\n\n")


OPENAI = Framing()


async def or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result; when the client goes first, `work` is cancelled.

    Raises: ClientDisconnect.
    """
    ours = asyncio.current_task()
    assert ours is not None
    over = left = False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal left
        if not over:
            left = True
            ours.cancel()

    watch = asyncio.ensure_future(_gone(request.receive))
    watch.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and ours.uncancel() == 0:  # else somebody else wants this task to end as well
            raise ClientDisconnect from None
        raise
    finally:
        over = True
        watch.cancel()


class Stream:
    """Events with the first one looked at beforehand, so that an early error still gets its own status."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self._first: asyncio.Future[bytes | None] | None = None

    async def begin(self, wait_s: float) -> None:
        """Waits for the first event, but not for ever. Raises: what the events raise before the first of them."""
        self._first = asyncio.ensure_future(anext(self._events, None))
        started = False
        try:
            done, _ = await asyncio.wait({self._first}, timeout=wait_s)
            if done:
                self._first.result()
            started = True
        finally:
            if not started:
                await self.close()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        assert self._first is not None
        first = await self._first
        if first is None:
            return
        yield first
        async for event in self._events:
            yield event

    async def close(self) -> None:
        if self._first is not None:
            await _end(self._first)
        await self._events.aclose()


class EventResponse(Response):
    """`keep_alive_s`: silence before a comment. `stall_s`: a client that takes no bytes for so long is cut off."""

    def __init__(
        self,
        stream: Stream,
        *,
        headers: dict[str, str],
        keep_alive_s: float,
        stall_s: float,
        framing: Framing = OPENAI,
    ) -> None:
        self.media_type = framing.media_type
        self._framing = framing
        self._stream = stream
        self._keep_alive_s = keep_alive_s
        self._stall_s = stall_s
        self._sending_since: float | None = None
        self._sent_at = 0.0
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(scope, send))
        gone = asyncio.ensure_future(_gone(receive))
        watch = asyncio.ensure_future(self._watch(send))
        try:
            done, _ = await asyncio.wait({pump, gone, watch}, return_when=asyncio.FIRST_COMPLETED)
            if pump in done:
                pump.result()
            elif watch in done and (abort := scope.get("nimbos.abort")) is not None:
                _log.info("client.cut_off", reason="takes no bytes", stall_s=self._stall_s)
                abort()
                await gone
        finally:
            await _end(pump)
            await _end(watch)
            await _end(gone)
            await self._stream.close()

    async def _pump(self, scope: Scope, send: Send) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._stream.__aiter__()) as events:
            try:
                async for event in events:
                    await self._send(send, event)
            except NimbosError as error:
                await self._send(send, self._framing.error(error))
            except ClientDisconnect:
                return
            except Exception as error:  # the top of this request: its client is told, the server lives on
                failure = errors.internal(scope["path"], error)
                await self._send(send, self._framing.error(failure))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._sending_since = loop.time()
        await send({"type": "http.response.body", "body": _on_its_line(event), "more_body": True})
        self._sending_since = None
        self._sent_at = loop.time()

    async def _watch(self, send: Send) -> None:
        """Keeps the connection alive; returns when the client has taken nothing for too long."""
        loop = asyncio.get_running_loop()
        tick = min(self._keep_alive_s, self._stall_s) / 4
        while True:
            await asyncio.sleep(tick)
            now = loop.time()
            if self._sending_since is not None:
                if now - self._sending_since > self._stall_s:
                    return
            elif self._framing.keep_alive is not None and now - self._sent_at >= self._keep_alive_s:
                try:
                    await asyncio.wait_for(self._send(send, self._framing.keep_alive), self._stall_s)
                except TimeoutError:
                    return


def _on_its_line(event: bytes) -> bytes:
    """Many clients split lines as Python's `splitlines` does, also at characters that JSON writes as they are; within
    its strings, where they stand, it may write them as escapes, too."""
    if not event.isascii():
        for raw, escape in _ENDS_OF_LINES:
            event = event.replace(raw, escape)
    return event


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancels a task of ours and waits until it has cleaned up; its own failure was somebody else's to see."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
