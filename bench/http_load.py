"""A light HTTP client for load: keep-alive connections that send one prepared request after another.

Written on asyncio's protocols because every library's client costs more processor time per request than the server
under measurement, and both share the same two cores.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(slots=True, eq=False)
class Loads:
    """What one run saw. `seconds`: of each request, from when it was due (open loop) or sent (closed loop)."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.took_s if self.took_s else 0.0


class Connection(asyncio.Protocol):
    """One request at a time; whole replies only, by `content-length`."""

    def __init__(self) -> None:
        self._buffer = b""
        self._waiting: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, mark, body = self._buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        at = head.lower().find(b"content-length:")
        size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(body) >= size and self._waiting is not None and not self._waiting.done():
            self._buffer = body[size:]
            self._waiting.set_result(head[:40])

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionError("closed"))

    async def ask(self, request: bytes) -> bytes:
        """The beginning of the reply's head."""
        assert self._transport is not None
        if self.lost:
            raise ConnectionError("closed")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def request_of(url: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    host = urlsplit(url).netloc
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", "content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def connect(url: str, count: int) -> list[Connection]:
    place = urlsplit(url)
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(Connection, place.hostname, place.port) for _ in range(count)]
    return [protocol for _, protocol in made]


async def closed_loop(url: str, request: bytes, *, connections: int, requests: int) -> Loads:
    """Each connection asks again as soon as it is answered."""
    loads = Loads()
    left = requests

    async def work(connection: Connection) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await _timed(connection, request, loads, time.perf_counter())

    open_ones = await connect(url, connections)
    started = time.perf_counter()
    await asyncio.gather(*(work(connection) for connection in open_ones))
    loads.took_s = time.perf_counter() - started
    for connection in open_ones:
        connection.close()
    return loads


async def open_loop(url: str, request: bytes, *, connections: int, per_second: float, requests: int) -> Loads:
    """Requests are sent at an even pace whatever the server does; waiting for a connection counts."""
    loads = Loads()
    idle: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    open_ones = await connect(url, connections)
    for connection in open_ones:
        idle.put_nowait(connection)

    async def one(due: float) -> None:
        connection = await idle.get()
        if connection.lost:  # a server ends what nobody uses for some seconds
            (connection,) = await connect(url, 1)
        await _timed(connection, request, loads, due)
        idle.put_nowait(connection)

    started = time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    for number in range(requests):
        due = started + number / per_second
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.ensure_future(one(time.perf_counter()))  # a timer that fires late is the client's own
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    loads.took_s = time.perf_counter() - started
    for connection in open_ones:
        connection.close()
    return loads


async def _timed(connection: Connection, request: bytes, loads: Loads, since: float) -> None:
    try:
        head = await connection.ask(request)
    except ConnectionError as error:
        loads.errors.append(str(error))
        return
    if b" 200 " not in head:
        loads.errors.append(head.decode("latin-1"))
    loads.seconds.append(time.perf_counter() - since)
