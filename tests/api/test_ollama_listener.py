"""`nimbos up --ollama`: a listener that asks for no key, and what it cannot be used for."""

from __future__ import annotations

import json
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import ollama
import openai
import pytest

from tests.api.test_up import run, up
from tests.live import user, write_script

PORTS = ("--ollama", "--ollama-port", "0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ollama") / "home"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("script")
    return f"scripted:{write_script(folder, 'play', {'default': {'text': 'Hello there!'}})}"


@pytest.fixture(scope="module")
def url(home: Path, script: str) -> Iterator[str]:
    with up(home, "--model", script, *PORTS) as server:
        yield listener_of(server.printed)


def listener_of(printed: str) -> str:
    found = re.search(r"Ollama:\s+(http://\S+) ", printed)
    assert found is not None, printed
    return found[1]


def test_it_listens_on_loopback_and_greets_as_ollama_does(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
    response = httpx2.get(url)
    assert (response.status_code, response.text) == (200, "Ollama is running")
    assert httpx2.head(url).status_code == 200


def test_the_official_client_needs_nothing_but_the_address(url: str) -> None:
    with ollama.Client(host=url) as client:
        assert [model.model for model in client.list().models] == ["play"]
        assert client.chat("play", messages=user("hi")).message.content == "Hello there!"
        assert "".join(piece.response or "" for piece in client.generate("play", "hi", stream=True)) == "Hello there!"


@pytest.mark.parametrize("key", ["ollama", "nb-wrong", ""])
def test_openais_client_works_with_any_key(url: str, key: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key or "-") as client:
        assert [model.id for model in client.models.list()] == ["play"]
        completion = client.chat.completions.create(model="play", messages=user("hi"))  # type: ignore[arg-type]
        assert completion.choices[0].message.content == "Hello there!"


def test_a_key_that_a_client_sends_gives_it_nothing_more(url: str, home: Path) -> None:
    owner = (home / "owner.key").read_text().strip()
    for headers in ({"authorization": f"Bearer {owner}"}, {"x-api-key": owner}):
        response = httpx2.post(f"{url}/api/pull", json={"model": "smollm2:135m"}, headers=headers)
        assert response.status_code == 403
        assert "admin" in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 403),
        ("GET", "/v1/organization/projects", 403),
        ("GET", "/v1/files", 403),
        ("POST", "/v1/batches", 403),
        ("POST", "/api/v1/services/aigc/text-generation/generation", 404),
        ("POST", "/compatible-mode/v1/chat/completions", 403),
        ("POST", "/api/pull", 403),
        ("DELETE", "/api/delete", 403),
    ],
)
def test_it_is_for_asking_alone(url: str, method: str, path: str, status: int) -> None:
    response = httpx2.request(method, url + path, content=json.dumps({"model": "play"}))
    assert response.status_code == status, response.text


def test_pages_of_other_places_and_names_that_were_made_to_point_here_are_refused(url: str) -> None:
    body = {"model": "play", "messages": user("hi")}
    response = httpx2.post(f"{url}/api/chat", json=body, headers={"origin": "https://evil.example"})
    assert response.status_code == 403
    assert httpx2.get(f"{url}/api/tags", headers={"host": "evil.example"}).status_code == 403
    assert httpx2.get(url, headers={"host": "evil.example"}).status_code == 403
    page = httpx2.get(f"{url}/api/tags", headers={"origin": "http://localhost:3000"})
    assert page.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_the_class_is_interactive_and_no_other(url: str) -> None:
    body = {"model": "play", "messages": user("hi"), "stream": False}
    response = httpx2.post(f"{url}/api/chat", json=body)
    assert response.headers["x-nimbos-class"] == "interactive"
    response = httpx2.post(f"{url}/api/chat", json=body, headers={"x-nimbos-class": "batch"})
    assert response.status_code == 403


def test_the_key_is_made_once_and_its_secret_is_its_owners_alone(url: str, home: Path, script: str) -> None:
    file = home / "ollama.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secret = file.read_text()
    with up(home, "--model", script, *PORTS) as again:
        assert secret.strip() not in again.printed
        assert httpx2.get(listener_of(again.printed) + "/api/tags").status_code == 200
    assert file.read_text() == secret


def test_without_the_option_there_is_no_listener_and_no_key(tmp_path: Path, script: str) -> None:
    with up(tmp_path / "home", "--model", script) as server:
        assert "Ollama" not in server.printed
    assert not (tmp_path / "home" / "ollama.key").exists()


def test_a_port_in_use_is_told_with_the_option_that_changes_it(tmp_path: Path, script: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        done = run(tmp_path / "home", "up", "--port", "0", "--model", script, "--ollama", "--ollama-port", port)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"127.0.0.1:{port} is in use" in line
    assert "--ollama-port" in line


def test_a_key_of_that_name_that_is_somebody_elses_is_left_alone(tmp_path: Path, script: str) -> None:
    home = tmp_path / "home"
    with up(home, "--model", script, *PORTS):
        pass
    (home / "ollama.key").unlink()
    done = run(home, "up", "--port", "0", "--model", script, *PORTS)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "nimbos key revoke ollama" in line
