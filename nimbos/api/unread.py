"""What a client does not read: bytes that wait for it in this process, and the end of its connection.

Below ASGI, so that it holds for every reply, a stream, a file or an answer in one piece, also when its request is over.
`sse.py` besides ends the ask behind a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Callable

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = structlog.get_logger(__name__)

PIECE_BYTES = 256 * 1024
_LOOKS = 4  # in the time that a client has
_LINGER = struct.Struct("ii")  # on or off, seconds


class Unread:
    """Watches one connection while bytes wait on it and none are added. `settled` says whether that is so."""

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        loop: asyncio.AbstractEventLoop,
        stall_s: float,
        settled: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._stall_s = stall_s
        self._settled = settled
        self._timer: asyncio.TimerHandle | None = None
        self._least = 0
        self._taken_at = 0.0

    def watch(self) -> None:
        """From now on, until all is taken; again and again costs nothing."""
        if self._timer is not None:
            self._least = max(self._least, self._waiting())  # more was added: what is taken of that counts, too
        elif self._transport.get_write_buffer_size():
            self._taken(self._waiting())
            self._look_later()

    def took(self) -> None:
        """The client has taken much: what waits now is not what waited before."""
        if self._timer is not None:
            self._taken(self._waiting())

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._transport.get_write_buffer_size() or not self._settled():
            return
        waiting = self._waiting()
        if waiting < self._least:
            self._taken(waiting)
        elif self._loop.time() - self._taken_at >= self._stall_s:
            _log.info("client.cut_off", reason="takes no bytes", stall_s=self._stall_s, unread_bytes=waiting)
            reset(self._transport)
            return
        self._look_later()

    def _waiting(self) -> int:
        """Bytes here and in the kernel, which asks for more only when much of what it has was taken."""
        return self._transport.get_write_buffer_size() + _in_kernel(self._transport)

    def _taken(self, waiting: int) -> None:
        self._least, self._taken_at = waiting, self._loop.time()

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(self._stall_s / _LOOKS, self._look)


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the client has not acknowledged; 0 where the system does not say."""
    if sys.platform == "linux":
        import fcntl
        import termios

        with contextlib.suppress(OSError, AttributeError, ValueError, RuntimeError):
            held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            return int.from_bytes(held, sys.byteorder)
    return 0


def reset(transport: asyncio.Transport) -> None:
    """Ends a connection so that nothing of it stays, in the kernel neither."""
    with contextlib.suppress(OSError, AttributeError):
        at_once = _LINGER.pack(1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    transport.abort()


class Pieces:
    """A large reply goes out piece by piece, each when there is room for it: what TLS is given at once it encrypts at
    once, and then nobody is told how much of that waits."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def cut(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= PIECE_BYTES:
                await send(message)
                return
            for start in range(0, len(body), PIECE_BYTES):
                end = start + PIECE_BYTES
                more = end < len(body) or message.get("more_body", False)
                await send({"type": message["type"], "body": body[start:end], "more_body": more})

        await self._app(scope, receive, cut)
