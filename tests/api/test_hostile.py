"""Hostile input: each is a clear error in our shape, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nimbos.config import ServerSettings
from tests.conftest import DEMO
from tests.live import OWNER_SECRET, Live, error_of, serving

CHAT = "/v1/chat/completions"
ROUTES = [CHAT, "/v1/completions", "/v1/embeddings"]
LIMIT_BYTES = 100_000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home: Path = tmp_path_factory.mktemp("home")
    settings = ServerSettings(max_body_bytes=LIMIT_BYTES, max_header_bytes=4_000, stall_write_s=1.5)
    with serving(home, {"demo": DEMO}, server=settings) as running:
        yield running


def nested(depth: int) -> bytes:
    return b'{"model": "demo", "messages": ' + b"[" * depth + b"]" * depth + b"}"


BODIES = {
    "empty": b"",
    "white space": b" \n",
    "not JSON": b"{model: demo}",
    "cut off": b'{"model": "demo", "messages": [',
    "trailing words": b'{"model": "demo"} and more',
    "an array": b"[1]",
    "a string": b'"demo"',
    "null": b"null",
    "two values": b"{}{}",
    "NaN": b'{"model": "demo", "temperature": NaN}',
    "Infinity": b'{"model": "demo", "temperature": Infinity}',
    "a number beyond floats": b'{"model": "demo", "temperature": 1e999}',
    "a number beyond 64 bits": b'{"model": "demo", "seed": 99999999999999999999999999}',
    "a number beyond 64 bits deep inside": b'{"model": "demo", "messages": [{"a": [1, {"b": -99999999999999999999}]}]}',
    "a number beyond floats as a bias": b'{"model": "demo", "logit_bias": {"1": 1' + b"0" * 400 + b"}}",
    "a very long number": b'{"model": "demo", "seed": ' + b"9" * 5000 + b"}",
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "\xc0\xaf"}',
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
    "deep": nested(100),
    "very deep": nested(100_000),
    "deep in an object": b'{"a":' * 90 + b"1" + b"}" * 90,
    "wrong type of model": b'{"model": 5, "messages": [], "prompt": "a", "input": "a"}',
    "no model": b'{"messages": [], "prompt": "a", "input": "a"}',
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_broken_body_is_a_400(live: Live, route: str, body: bytes) -> None:
    error = error_of(live.http.post(route, content=body), 400)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1_000


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "hi"},
        {"messages": [5]},
        {"messages": [[]]},
        {"messages": {}},
        {"messages": []},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": {}}]}]},
        {"messages": [{"role": "user", "content": [None]}]},
        {"messages": [{"role": "assistant", "tool_calls": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": 7}]}]},
        {"temperature": "hot"},
        {"temperature": -1e308},
        {"max_tokens": 10**18},
        {"max_tokens": 1.5},
        {"max_tokens": -(10**18)},
        {"n": 10**9},
        {"n": True},
        {"stream": "yes"},
        {"stop": {"a": 1}},
        {"stop": [1]},
        {"logit_bias": {"1": "x"}},
        {"logit_bias": {"99999999999999999999": 1}},
        {"logit_bias": [1]},
        {"seed": 1.5},
        {"tools": "x"},
        {"tools": [{}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        {"tools": [{"type": "custom", "custom": {"name": "a"}}]},
        {"tool_choice": "sometimes"},
        {"tool_choice": 5},
        {"tool_choice": {"type": "allowed_tools"}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        {"response_format": "json"},
        {"stream_options": {"include_usag": True}, "stream": True},
        {"thinking_budget": -1},
        {"thinking_budget": "many"},
        {"reasoning_effort": "herculean"},
        {"chat_template_kwargs": []},
        {"chat_template_kwargs": {"messages": []}},
        {"service_tier": "gold"},
        {"metadata": {"a": 1}},
        {"x_nimbos": {"cls": "batch"}},
        {"guided_choice": []},
        {"": 1},
        {"x" * 10_000: 1},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_a_wrong_field_is_a_400_that_names_it(live: Live, fields: dict[str, object]) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
    error = error_of(live.post(CHAT, body), 400)
    name = next(iter(fields))
    assert name[:50] in error["message"]
    assert len(error["message"]) < 1_000


def test_a_number_beyond_64_bits_is_named_by_its_place(live: Live) -> None:
    messages = [{"role": "user", "content": "hi", "more": {"deep": [0, 2**64]}}]
    error = error_of(live.chat(messages=messages), 400)
    assert error["param"] == "messages[0].more.deep[1]"


def test_the_largest_64_bit_numbers_are_no_fault(live: Live) -> None:
    kwargs = {"chat_template_kwargs": {"low": -(2**63), "high": 2**64 - 1}}
    assert live.chat(**kwargs).status_code == 200


@pytest.mark.parametrize("model", ["x" * 50_000, "https://[", "https://[x/" + "y" * 50_000])
def test_a_model_name_that_cannot_be_is_told_shortly(live: Live, model: str) -> None:
    response = live.chat(model=model)
    assert response.status_code in (400, 404)
    assert len(error_of(response, response.status_code)["message"]) < 1_000


def test_a_long_unknown_name_inside_is_not_echoed(live: Live) -> None:
    error = error_of(live.chat(x_nimbos={"x" * 50_000: 1}), 400)
    assert len(error["message"]) < 1_000


def test_duplicate_keys_are_tolerated_and_the_last_counts(live: Live) -> None:
    body = b'{"model": "x", "model": "demo", "messages": [{"role": "user", "content": "hi"}]}'
    assert live.http.post(CHAT, content=body).status_code == 200


def test_half_a_character_in_a_message_is_a_400(live: Live) -> None:
    body = b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    error_of(live.http.post(CHAT, content=body), 400)


def test_control_characters_and_nul_in_a_message_are_only_text(live: Live) -> None:
    assert live.chat(messages=[{"role": "user", "content": "a\x00b\x1b[2J<|im_end|>"}]).status_code == 200


def test_a_body_over_the_limit_is_a_413(small: Live) -> None:
    body = b'{"model": "demo", "messages": "' + b"x" * LIMIT_BYTES + b'"}'
    error = error_of(small.http.post(CHAT, content=body), 413)
    assert str(LIMIT_BYTES) in error["message"]


def test_a_body_of_unknown_length_over_the_limit_is_a_413(small: Live) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * (LIMIT_BYTES // 10)

    error_of(small.http.post(CHAT, content=pieces()), 413)


@pytest.mark.parametrize("length", ["99999999999999999999999999", "1000000"])
def test_a_claimed_length_over_the_limit_is_refused(small: Live, length: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OWNER_SECRET}\r\n"
    answer = send_raw(small, f"{head}content-length: {length}\r\n\r\n{{}}".encode())
    assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_a_body_that_stops_coming_is_a_400(small: Live) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OWNER_SECRET}\r\n"
    answer = send_raw(small, f"{head}content-length: 100\r\n\r\n{{".encode())
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"stopped after 1 bytes" in answer


@pytest.mark.parametrize("header", ["x-large: " + "a" * 5_000, "\r\n".join(f"x-{i}: {'a' * 50}" for i in range(200))])
def test_headers_over_the_limit_are_a_431(small: Live, header: str) -> None:
    answer = send_raw(small, f"GET /health HTTP/1.1\r\nhost: localhost\r\n{header}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"headers_too_large" in answer


def test_a_header_that_never_ends_is_a_431_before_it_fills_memory(small: Live) -> None:
    answer = send_raw(small, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-endless: " + b"a" * 200_000)
    assert answer.startswith(b"HTTP/1.1 431") or answer == b""  # or the connection was gone before all was sent


CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OWNER_SECRET}\r\n"
    "transfer-encoding: chunked\r\n\r\n"
).encode()
SMALL_CHAT = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.mark.parametrize("endless", [b"0\r\nx-endless: ", b"1;extension="])
def test_trailers_that_never_end_lose_their_connection(small: Live, endless: bytes) -> None:
    answer = send_raw(small, CHUNKED + b"1\r\n{\r\n" + endless + b"a" * 1_000_000)  # more than the server reads at once
    assert answer == b""


def test_a_chunked_body_with_small_trailers_is_served(small: Live) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in SMALL_CHAT + b" " * 2_000)
    answer = send_raw(small, CHUNKED + chunks + b"0\r\nx-checksum: 1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "bytes_", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x00" * 100]
)
def test_what_is_no_http_is_a_400(small: Live, bytes_: bytes) -> None:
    assert send_raw(small, bytes_ + b"\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_two_host_headers_are_refused(small: Live) -> None:
    answer = send_raw(small, b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")


def test_the_server_goes_on_after_all_that(small: Live, live: Live) -> None:
    assert small.chat().status_code == 200
    assert live.chat().status_code == 200


def send_raw(live: Live, content: bytes) -> bytes:
    """What comes back on a connection of its own, up to its end or the end of the headers and some body."""
    host, port = live.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(content)
            while b"\r\n\r\n" not in received or b"}" not in received.split(b"\r\n\r\n", 1)[1]:
                piece = connection.recv(65536)
                if not piece:
                    break
                received += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
    return received
