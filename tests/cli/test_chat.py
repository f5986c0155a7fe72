"""`nimbos chat`: whom it talks to, and who gets the owner's key."""

from __future__ import annotations

import io
from pathlib import Path

import httpx2
import msgspec
import pytest
from rich.console import Console

from nimbos.cli.conversation import Conversation, ServerRefused, _connect, _first_model
from nimbos.errors import InvalidRequest, Unauthorized
from nimbos.presence import RunningServer
from tests.cli.command import make_home, refusal

OWN, SECRET = "http://127.0.0.1:8123", "nb-owner"
DEEP = '{"x": ' + "[" * 100_000


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With an owner's key, and a server that says it runs."""
    home = make_home(tmp_path)
    (home / "owner.key").write_text(f"{SECRET}\n")
    (home / "run").mkdir()
    (home / "run" / "server.json").write_bytes(msgspec.json.encode(RunningServer(pid=1, url=OWN)))
    monkeypatch.setenv("NIMBOS_HOME", str(home))
    return home


@pytest.mark.parametrize("url", [None, OWN, f"{OWN}/v1", f"{OWN}/"])
def test_the_owners_key_goes_to_the_own_server_past_any_proxy(
    home: Path, monkeypatch: pytest.MonkeyPatch, url: str | None
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    with _connect(url, None) as client:
        assert client.headers["authorization"] == f"Bearer {SECRET}"
        assert str(client.base_url).rstrip("/") == OWN
        assert not client.trust_env


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8124", "https://127.0.0.1:8123", "http://example.com:8123", "http://127.0.0.1.example:8123"],
)
def test_the_owners_key_goes_to_no_other(home: Path, url: str) -> None:
    with pytest.raises(Unauthorized, match="--key"):
        _connect(url, None)
    with _connect(url, "nb-theirs") as client:
        assert client.headers["authorization"] == "Bearer nb-theirs"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:8000", "http://[", "http://"])
def test_what_is_no_address_is_refused(home: Path, url: str) -> None:
    with pytest.raises(InvalidRequest):
        _connect(url, "nb-theirs")


def test_the_refusal_is_one_line(home: Path) -> None:
    assert "NIMBOS_API_KEY" in refusal(home, "chat", "--url", "http://127.0.0.1:8124")


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file")
    assert str(home) in refusal(home, "pull", str(tmp_path / "none.gguf"))


def saying(said: str) -> httpx2.Client:
    """A server of somebody else's, that says this whatever it is asked."""
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text=said))
    return httpx2.Client(transport=transport, base_url="http://elsewhere.example")


def test_an_answer_of_another_server_is_read_as_far_as_it_goes() -> None:
    said = [
        ": alive",
        'data:{"id": 7, "choices": [{"delta": {"role": "assistant", "content": null}}]}',
        'data: {"choices": [{"delta": {"content": "Hel"}, "index": 0}], "usage": null}',
        'data: {"choices": [{"delta": {"content": "lo"}}]}',
        'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        'data: {"usage": {"completion_tokens": 2, "prompt_tokens": 1}}',
        "data:[DONE]",
    ]
    with saying("\n\n".join(said)) as client:
        answer = Conversation(client, "m").ask("hello", Console(file=io.StringIO()))
    assert (answer.text, answer.tokens) == ("Hello", 2)


@pytest.mark.parametrize(
    "said", ["{", "[]", '{"choices": 7}', '{"choices": [{"delta": 7}]}', '{"error": {"message": "no"}}', DEEP]
)
def test_what_is_no_answer_is_said_so(said: str) -> None:
    with saying(f"data: {said}\n\n") as client, pytest.raises(ServerRefused):
        Conversation(client, "m").ask("hello", Console(file=io.StringIO()))


@pytest.mark.parametrize("said", ["<html>", "[]", '{"data": 7}', '{"data": [{}]}'])
def test_what_is_no_list_of_models_is_said_so(said: str) -> None:
    with saying(said) as client, pytest.raises(ServerRefused, match="--model"):
        _first_model(client)
