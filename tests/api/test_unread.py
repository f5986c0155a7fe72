"""Replies in one piece whose client does not read them: the connection ends and keeps nothing, with TLS and without."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nimbos.api import unread
from nimbos.api.unread import PIECE_BYTES, Pieces, Unread
from nimbos.config import ServerSettings
from tests.api.test_tls import write_certificate
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user

LARGE = {"default": {"text": "a" * 24_000_000}}  # one token; more than the kernel keeps for a connection


@contextlib.contextmanager
def asked(
    live: Live, certificate: Path | None = None, *, connection: str = "close", buffer_bytes: int = 1 << 20
) -> Iterator[socket.socket]:
    """A connection on which a large answer was asked for."""
    host, port = live.url.rpartition("/")[2].split(":")
    body = json.dumps({"model": "demo", "messages": user("hi")}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OWNER_SECRET}\r\n"
        f"connection: {connection}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    raw.settimeout(PATIENCE_S)
    raw.connect((host, int(port)))
    if certificate is not None:
        raw = ssl.create_default_context(cafile=str(certificate)).wrap_socket(raw, server_hostname=host)
    with raw:
        raw.sendall(head.encode() + body)
        yield raw


def ended(connection: socket.socket) -> bool:
    """Waits for the connection's end without reading from it."""
    watching = select.poll()
    watching.register(connection.fileno(), 0)
    return bool(watching.poll(PATIENCE_S * 1000))


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_takes_nothing_of_a_whole_reply_is_cut_off(tmp_path: Path, tls: bool, connection: str) -> None:
    certificate, key = write_certificate(tmp_path) if tls else (None, None)
    settings = ServerSettings(
        stall_write_s=0.4, tls_cert=str(certificate) if certificate else "", tls_key=str(key) if key else ""
    )
    with (
        serving(tmp_path, {"demo": LARGE}, server=settings) as live,
        asked(live, certificate, connection=connection, buffer_bytes=4096) as held,
    ):
        assert ended(held)
        assert live.sources["demo"].active == 0


def test_one_that_reads_gets_all_of_it(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": LARGE}, server=ServerSettings(stall_write_s=5)) as live:
        with asked(live) as reading:
            have = bytearray()
            while piece := reading.recv(1 << 20):
                have += piece
        head, _, body = have.partition(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head.lower()
        assert json.loads(body)["choices"][0]["message"]["content"] == LARGE["default"]["text"]


class Bench:
    """A loop and a transport of which the test turns the clock and takes the bytes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting = 0
        self.settled = True
        self.aborted = False
        self._due: list[tuple[float, Callable[[], None]]] = []
        self.unread = Unread(
            cast(asyncio.Transport, self), loop=cast(asyncio.AbstractEventLoop, self), stall_s=8.0,
            settled=lambda: self.settled,
        )  # fmt: skip

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        entry = (self.now + delay, act)
        self._due.append(entry)

        class Handle:
            @staticmethod
            def cancel() -> None:
                self._due.remove(entry)

        return cast(asyncio.TimerHandle, Handle())

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def get_extra_info(self, name: str) -> Any:
        return None

    def abort(self) -> None:
        self.aborted = True

    @property
    def watched(self) -> bool:
        return bool(self._due)

    def turn(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, act = self._due.pop(0)
            act()
        self.now = until


def test_who_takes_a_little_now_and_then_is_not_cut_off() -> None:
    bench = Bench()
    bench.waiting = 100
    bench.unread.watch()
    for _ in range(20):
        bench.waiting -= 5
        bench.turn(7)
    assert not bench.aborted
    assert not bench.watched, "all is taken"


def test_who_takes_nothing_is_cut_off_in_time() -> None:
    bench = Bench()
    bench.waiting = 100
    bench.unread.watch()
    bench.turn(7)
    bench.unread.watch()
    assert not bench.aborted
    bench.turn(3)
    assert bench.aborted
    assert not bench.watched


def test_who_took_much_before_more_was_added_is_not_cut_off() -> None:
    bench = Bench()
    for size in (100, 150, 200, 250):
        bench.waiting = size
        bench.unread.watch()
        bench.turn(6)
        bench.unread.took()
    assert not bench.aborted


def test_what_is_taken_of_what_was_added_counts() -> None:
    bench = Bench()
    bench.waiting = 100
    bench.unread.watch()
    bench.waiting = 1_000  # the next piece, while it is watched
    bench.unread.watch()
    for _ in range(10):
        bench.waiting -= 50
        bench.turn(6)
    assert not bench.aborted


def test_an_answer_that_goes_on_is_not_watched() -> None:
    """What waits grows then, whether the client reads or not."""
    bench = Bench()
    bench.waiting = 100
    bench.unread.watch()
    bench.settled = False
    bench.turn(100)
    assert not bench.aborted
    assert not bench.watched


def test_what_a_client_takes_of_the_kernels_bytes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps megabytes, and takes more from here only when much of them is gone."""
    bench, kernel = Bench(), [1_000_000]
    monkeypatch.setattr(unread, "_in_kernel", lambda transport: kernel[0])
    bench.waiting = 100
    bench.unread.watch()
    for _ in range(20):
        kernel[0] -= 1000
        bench.turn(7)
    assert not bench.aborted
    bench.turn(12)
    assert bench.aborted


def test_nothing_to_take_and_a_connection_that_is_over_need_no_watch() -> None:
    bench = Bench()
    bench.unread.watch()
    assert not bench.watched
    bench.waiting = 1
    bench.unread.watch()
    bench.unread.end()
    bench.turn(100)
    assert not bench.aborted


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
@pytest.mark.parametrize("more", [False, True])
async def test_pieces_are_the_whole_and_only_the_last_ends_it(size: int, more: bool) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    sent: list[dict[str, Any]] = []

    async def app(scope: object, receive: object, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def receive() -> dict[str, Any]:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    await Pieces(app)({"type": "http"}, receive, send)
    start, *pieces = sent
    assert start["status"] == 200
    assert b"".join(piece["body"] for piece in pieces) == body
    assert all(len(piece["body"]) <= PIECE_BYTES for piece in pieces)
    assert [piece.get("more_body", False) for piece in pieces] == [True] * (len(pieces) - 1) + [more]
