"""Who may come in: keys, scopes, hosts, origins; and what needs no key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from nimbos.config import ServerSettings
from tests.conftest import DEMO
from tests.live import OWNER_SECRET, Live, error_of, serving, user

KEYS = f"""
[keys.guest]
key = "nb-guest"
account = "guest"

[keys.night]
sha256 = "{hashlib.sha256(b"nb-night").hexdigest()}"
account = "night"
scopes = ["class:batch"]
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with more keys than the owner's, a name and an origin."""
    home: Path = tmp_path_factory.mktemp("home")
    (home / "keys.toml").write_text(KEYS)
    settings = ServerSettings(allow_hosts=("nimbos.example",), allow_origins=("https://app.example",))
    with serving(home, {"demo": DEMO}, server=settings) as running:
        yield running


def get(live: Live, path: str, **headers: str) -> httpx2.Response:
    """Without the owner's key."""
    return httpx2.get(live.url + path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def ask(live: Live, secret: str, **fields: Any) -> httpx2.Response:
    body = {"model": "demo", "messages": user("hi"), **fields}
    headers = {"authorization": f"Bearer {secret}"}
    return httpx2.post(live.url + "/v1/chat/completions", json=body, headers=headers)


def test_health_needs_no_key_and_says_only_ready(live: Live) -> None:
    response = get(live, "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/demo", "/metrics", "/v1/nothing", "/"])
def test_everything_else_needs_a_key(live: Live, path: str) -> None:
    assert error_of(get(live, path), 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer", "Basic abc", "Bearer a b", OWNER_SECRET, "Bearer nb-tést"]
)
def test_a_wrong_key_is_refused_and_not_shown(live: Live, header: str) -> None:
    response = httpx2.get(live.url + "/v1/models", headers={"authorization": header.encode()})
    assert error_of(response, 401)["type"] == "authentication_error"
    assert "wrong" not in response.text
    assert OWNER_SECRET not in response.text


def test_the_official_client_sees_an_authentication_error(live: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="no", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_keys_of_the_file_work_for_their_own_account(shared: Live) -> None:
    assert ask(shared, "nb-guest").status_code == 200
    guest = shared.sources["demo"].asks[-1].account
    assert ask(shared, "nb-night").headers["x-nimbos-class"] == "batch"
    night = shared.sources["demo"].asks[-1].account
    listed = shared.http.get("/v1/organization/projects", params={"limit": 100}).json()["data"]
    assert {project["name"]: project["id"] for project in listed} == {
        "default": "proj_default",
        "guest": guest,
        "night": night,
    }


def test_a_key_is_limited_to_its_classes(shared: Live) -> None:
    assert "batch" in error_of(ask(shared, "nb-night", service_tier="priority"), 403)["message"]


def test_metrics_need_the_scope_admin(shared: Live) -> None:
    response = get(shared, "/metrics", authorization="Bearer nb-guest")
    assert "admin" in error_of(response, 403)["message"]
    assert shared.http.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "169.254.1.1"]
)
def test_a_foreign_host_is_refused_even_with_the_key(live: Live, host: str) -> None:
    error_of(live.http.get("/v1/models", headers={"host": host}), 403)
    error_of(live.http.get("/health", headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "localhost.:8000"])
def test_loopback_by_any_name_is_ours(live: Live, host: str) -> None:
    assert live.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_an_allowed_host_comes_in(shared: Live) -> None:
    assert shared.http.get("/v1/models", headers={"host": "nimbos.example:8000"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://[", ""])
def test_a_foreign_origin_is_refused(live: Live, origin: str) -> None:
    error_of(live.http.get("/v1/models", headers={"origin": origin}), 403)


def test_an_allowed_origin_may_read_the_answer(shared: Live) -> None:
    response = shared.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    preflight = httpx2.options(
        shared.url + "/v1/chat/completions",
        headers={"origin": "https://app.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_a_failed_ask_of_an_allowed_origin_may_be_read_too(shared: Live) -> None:
    response = get(shared, "/v1/models", origin="https://app.example")
    error_of(response, 401)
    assert response.headers["access-control-allow-origin"] == "https://app.example"
