"""Streams and their clients: gone, slow, silent; and the server when it is told to stop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx2
import pytest
from starlette.requests import ClientDisconnect

from nimbos.api.merge import merge
from nimbos.api.sse import EventResponse, Stream
from nimbos.config import ServerSettings
from nimbos.errors import EngineFailed
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user

ENDLESS = {"replies": [{"match": "flood", "text": "on and on " * 200_000}]}
PACED = {"default": {"text": "a b c d e f g h", "tokens_per_second": 20}, "replies": []}


def wait_for_end(live: Live) -> None:
    assert live.sources["demo"].ended.acquire(timeout=PATIENCE_S)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_cancels_its_ask(tmp_path: Path, stream: bool) -> None:
    script = {"default": {"text": "on and " * 5000, "tokens_per_second": 50}}
    with serving(tmp_path, {"demo": script}) as live:
        body = {"model": "demo", "messages": user("hi"), "stream": stream}
        timeout = None if stream else httpx2.Timeout(PATIENCE_S, read=1.5)
        with httpx2.Client(base_url=live.url, headers=live.headers, timeout=timeout) as client:
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    client.post("/v1/chat/completions", json=body)
        wait_for_end(live)
        assert live.sources["demo"].active == 0
        text = live.http.get("/metrics").text
    assert 'nimbos_asks_total{ask_class="interactive",model="demo",outcome="cancelled"} 1.0' in text
    assert 'nimbos_asks_running{ask_class="interactive",model="demo"} 0.0' in text


def test_what_a_client_that_went_has_used_is_counted(tmp_path: Path) -> None:
    script = {"default": {"text": "on and " * 5000, "tokens_per_second": 200}}
    with serving(tmp_path, {"demo": script}) as live:
        body = {"model": "demo", "messages": user("one two"), "stream": True}
        with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            while "and" not in next(lines):
                pass
        wait_for_end(live)
        text = live.http.get("/metrics").text
    assert 'nimbos_tokens_total{ask_class="interactive",meter="input",model="demo"} 2.0' in text
    assert 'meter="output"' in text


def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    settings = ServerSettings(stall_write_s=0.4, keep_alive_s=0.2)
    with serving(tmp_path, {"demo": ENDLESS}, server=settings) as live:
        host, port = live.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "demo", "messages": user("flood"), "stream": True, "n": 8}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OWNER_SECRET}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(head.encode() + body)
            wait_for_end(live)
        assert live.sources["demo"].active == 0
        assert live.chat(messages=user("flood"), max_tokens=1).status_code == 200


def test_a_silent_stream_is_kept_alive_by_comments(tmp_path: Path) -> None:
    script = {"default": {"text": "a b", "tokens_per_second": 2}}
    with serving(tmp_path, {"demo": script}, server=ServerSettings(keep_alive_s=0.1)) as live:
        text = live.chat(stream=True).text
    assert text.count(": keep-alive\n\n") >= 2
    assert text.endswith("data: [DONE]\n\n")


def test_a_stop_of_the_server_lets_answers_finish(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": PACED}) as live:
        body = {"model": "demo", "messages": user("hi"), "stream": True}
        with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            live.stop()
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"


async def test_a_failure_before_the_first_event_is_raised_and_after_it_is_an_event() -> None:
    async def failing(after: int) -> AsyncGenerator[bytes, None]:
        for number in range(after):
            yield b"data: %d\n\n" % number
        raise EngineFailed("The engine broke.")

    with pytest.raises(EngineFailed):
        await Stream(failing(0)).begin(5)
    stream = Stream(failing(2))
    await stream.begin(5)
    sent = await respond(stream)
    assert sent[:2] == [b"data: 0\n\n", b"data: 1\n\n"]
    assert json.loads(sent[2].removeprefix(b"data: "))["error"]["code"] == "engine_failed"


async def test_a_bug_in_the_middle_of_a_stream_says_nothing_of_its_text() -> None:
    async def buggy() -> AsyncGenerator[bytes, None]:
        yield b"data: 0\n\n"
        raise ValueError("the prompt was: secret words")

    stream = Stream(buggy())
    await stream.begin(5)
    sent = await respond(stream)
    assert json.loads(sent[1].removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert b"secret" not in b"".join(sent)


async def test_a_late_first_event_begins_the_stream_and_then_comes() -> None:
    release = asyncio.Event()

    async def late() -> AsyncGenerator[bytes, None]:
        await release.wait()
        yield b"data: late\n\n"

    stream = Stream(late())
    await stream.begin(0)
    release.set()
    assert (await respond(stream))[0] == b"data: late\n\n"


async def test_closing_a_merge_closes_every_source() -> None:
    closed: list[int] = []

    async def source(number: int) -> AsyncGenerator[int, None]:
        try:
            for item in range(1000):
                yield item
                await asyncio.sleep(0)
        finally:
            closed.append(number)

    merged = merge([source(number) for number in range(3)])
    async for _ in merged:
        break
    await merged.aclose()
    assert sorted(closed) == [0, 1, 2]


async def test_a_merge_gives_all_items_of_each_source_in_order() -> None:
    async def source(number: int) -> AsyncGenerator[int, None]:
        for item in range(number * 50):
            yield item

    got: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    async for number, item in merge([source(number) for number in range(4)]):
        got[number].append(item)
    assert got == {number: list(range(number * 50)) for number in range(4)}


async def test_the_first_failure_ends_a_merge_and_the_others() -> None:
    closed = asyncio.Event()

    async def good() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            closed.set()

    async def bad() -> AsyncGenerator[int, None]:
        yield 1
        raise EngineFailed("The engine broke.")

    with pytest.raises(EngineFailed):
        async for _ in merge([good(), bad()]):
            pass
    assert closed.is_set()


async def respond(stream: Stream) -> list[bytes]:
    """The bodies that a response sends to a client that stays."""
    sent: list[bytes] = []
    forever = asyncio.Event()

    async def receive() -> dict[str, object]:
        await forever.wait()
        raise ClientDisconnect

    async def send(message: dict[str, object]) -> None:
        if message.get("body"):
            sent.append(bytes(message["body"]))  # type: ignore[call-overload]

    response = EventResponse(stream, headers={}, keep_alive_s=60, stall_s=60)
    await response({"type": "http", "path": "/"}, receive, send)  # type: ignore[arg-type]
    return sent
