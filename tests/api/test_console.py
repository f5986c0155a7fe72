"""Log-in over HTTP: the cookie and what it is good for, and that no other page can use it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from nimbos.accounts import Accounts, Identity, Role
from nimbos.accounts import people as persons
from nimbos.accounts.words import LOCAL
from nimbos.api import admin
from nimbos.config import ServerSettings
from nimbos.db import Database
from nimbos.types import Account
from tests.conftest import DEMO
from tests.live import Live, error_of, serving, user

PASSWORD = "correct horse battery"
CREDENTIALS = {"name": "ann@example.org", "password": PASSWORD}
PROJECTS = "/v1/organization/projects"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = ServerSettings(allow_origins=("https://console.example",))
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO}, server=settings) as running:
        made = running.post(
            "/v1/organization/users", {"email": "ann@example.org", "role": "admin", "password": PASSWORD}
        )
        assert made.status_code == 200
        yield running


@pytest.fixture
def browser(server: Live) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def log_in(browser: httpx2.Client) -> httpx2.Response:
    response = browser.post("/v1/console/login", json=CREDENTIALS)
    assert response.status_code == 200, response.text
    return response


def test_a_log_in_sets_a_cookie_that_no_script_reads_and_no_other_site_sends(browser: httpx2.Client) -> None:
    response = log_in(browser)
    cookie = response.headers["set-cookie"].lower()
    assert cookie.startswith("nimbos_session=ns-")
    for word in ("httponly", "samesite=strict", "path=/", "max-age=43200"):
        assert word in cookie
    assert response.json()["email"] == "ann@example.org"
    assert "ns-" not in response.text


async def test_over_tls_the_browser_itself_holds_the_cookie_to_this_host(database: Database) -> None:
    accounts = await Accounts.open(database)
    hashed = await accounts.passwords.hashed(PASSWORD)
    await accounts.change(LOCAL, lambda: persons.create_user("ann@example.org", role=Role.READER, password_hash=hashed))
    identity = Identity(account=Account(id="", name=""), actor=LOCAL, role=None)
    transport = httpx2.ASGITransport(app=admin.app(accounts, identity))
    async with httpx2.AsyncClient(transport=transport, base_url="https://nimbos.example") as browser:
        response = await browser.post("/v1/console/login", json=CREDENTIALS)
    cookie = response.headers["set-cookie"].lower()
    assert cookie.startswith("__host-nimbos_session=ns-")
    assert "secure" in cookie
    assert "domain" not in cookie
    await accounts.close()


def test_who_am_i(browser: httpx2.Client, server: Live) -> None:
    error_of(browser.get("/v1/console/me"), 401)
    log_in(browser)
    me = browser.get("/v1/console/me").json()
    assert (me["email"], me["role"], me["actor"]) == ("ann@example.org", "admin", "session")
    assert "limits" in me["may"]
    assert "owners" not in me["may"]
    owner = server.http.get("/v1/console/me").json()
    assert (owner["id"], owner["role"], owner["actor"]) == ("user_owner", "owner", "api_key")


def test_a_log_in_administers_and_asks_nothing(browser: httpx2.Client) -> None:
    log_in(browser)
    assert browser.get(PROJECTS).status_code == 200
    assert browser.get("/metrics").status_code == 200
    asked = browser.post("/v1/chat/completions", json={"model": "demo", "messages": user("hi")})
    assert "needs a key" in error_of(asked, 401)["message"]


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "https://evil.example",
        "http://localhost:1",
        "http://127.0.0.1:1",
        "http://127.0.0.1",
        "http://[",
    ],
)
def test_a_change_with_the_cookie_must_come_from_this_very_origin(browser: httpx2.Client, origin: str | None) -> None:
    log_in(browser)
    headers = {} if origin is None else {"origin": origin}
    error_of(browser.post(PROJECTS, json={"name": "forged"}, headers=headers), 403)
    assert "forged" not in browser.get(PROJECTS).text


def test_a_page_of_this_server_and_an_allowed_one_may_change(browser: httpx2.Client, server: Live) -> None:
    log_in(browser)
    assert browser.post(PROJECTS, json={"name": "own"}, headers={"origin": server.url}).status_code == 200
    allowed = {"origin": "https://console.example"}
    assert browser.post(PROJECTS, json={"name": "allowed"}, headers=allowed).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1"])
def test_another_page_cannot_log_one_in(browser: httpx2.Client, origin: str) -> None:
    error_of(browser.post("/v1/console/login", json=CREDENTIALS, headers={"origin": origin}), 403)


def test_a_log_out_ends_the_session_everywhere(browser: httpx2.Client, server: Live) -> None:
    log_in(browser)
    kept = dict(browser.cookies)
    done = browser.post("/v1/console/logout", headers={"origin": server.url})
    assert done.status_code == 200
    assert "max-age=0" in done.headers["set-cookie"].lower()
    with httpx2.Client(base_url=server.url, cookies=kept) as other:
        error_of(other.get("/v1/console/me"), 401)


def test_a_key_does_not_log_out(server: Live) -> None:
    error_of(server.post("/v1/console/logout", {}), 409)


@pytest.mark.parametrize("value", ["ns-wrong", "", "x" * 5000, "a=b", '"quoted"'])
def test_a_cookie_that_is_none_is_refused(server: Live, value: str) -> None:
    error_of(httpx2.get(server.url + PROJECTS, headers={"cookie": f"nimbos_session={value}"}), 401)


def test_log_ins_and_log_outs_are_in_the_audit_log(browser: httpx2.Client, server: Live) -> None:
    log_in(browser)
    browser.post("/v1/console/logout", headers={"origin": server.url})
    out, into = server.http.get("/v1/organization/audit_logs?limit=2").json()["data"]
    assert (out["type"], into["type"]) == ("logout.succeeded", "login.succeeded")
    assert into["actor"]["session"]["user"]["email"] == "ann@example.org"
    assert into["actor"]["session"]["ip_address"] == "127.0.0.1"


def test_guessing_gets_a_429_with_an_honest_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO}) as server:
        body = {"name": "owner", "password": "wrong password"}
        answers = [httpx2.post(f"{server.url}/v1/console/login", json=body) for _ in range(8)]
        assert [answer.status_code for answer in answers[:5]] == [401] * 5
        slowed = answers[6]  # the seventh; on a slow machine a later one may come when its wait is over
        assert slowed.status_code == 429
        assert int(slowed.headers["retry-after"]) >= 1
        for _ in range(30):
            last = httpx2.get(f"{server.url}/v1/models", headers={"x-api-key": "nb-guess"})
        assert last.status_code == 429
        assert int(last.headers["retry-after"]) >= 1
        assert "guess" not in last.text
        assert server.http.get("/v1/models").status_code == 200  # a good key from the same address


def test_a_key_may_use_its_routes_alone_in_either_header(server: Live) -> None:
    body = {"name": "narrow", "scopes": ["route:/v1/embeddings"]}
    secret = server.post(f"{PROJECTS}/proj_default/api_keys", body).json()["value"]
    for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
        asked = httpx2.post(
            f"{server.url}/v1/chat/completions", json={"model": "demo", "messages": user("hi")}, headers=headers
        )
        assert "/v1/chat/completions" in error_of(asked, 403)["message"]
        assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx2.post(f"{server.url}/v1/embeddings", json={}, headers=headers).status_code == 400


def test_authorization_goes_before_x_api_key(server: Live) -> None:
    headers = {"authorization": "Bearer nb-wrong", "x-api-key": "nb-test-owner"}
    error_of(httpx2.get(f"{server.url}/v1/models", headers=headers), 401)
