"""Every route of administration, one by one: each change leaves one row in the audit log, each role may what the table
says, and no secret is anywhere but in the answer that makes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nimbos.accounts import Action, Role
from nimbos.accounts.keys import update_key
from nimbos.accounts.roles import may
from nimbos.accounts.words import Key
from nimbos.api.admin import admin_routes, keys
from nimbos.api.admin.desk import AdminRoute, Call
from tests.conftest import DEMO
from tests.live import Live, serving, user

ROUTES = {(route.method, route.path): route for route in admin_routes()}
CHANGES = {key: route for key, route in ROUTES.items() if route.method != "GET"}
PASSWORD = "correct horse battery"
NUMBERS = count()
ALERT = {
    "threshold_amount": 100,
    "currency": "USD",
    "interval": "month",
    "notification_channel": {"type": "email", "recipients": []},
}
LIMIT = {"threshold_amount": 100, "currency": "USD", "interval": "month"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO}) as running:
        yield running


class World:
    """Makes what a route needs: every call is something new."""

    def __init__(self, server: Live) -> None:
        self.server = server

    def post(self, path: str, body: Any) -> dict[str, Any]:
        response = self.server.post(f"/v1/organization{path}", body)
        assert response.status_code == 200, response.text
        made: dict[str, Any] = response.json()
        return made

    def project(self) -> str:
        return str(self.post("/projects", {"name": f"project {next(NUMBERS)}"})["id"])

    def user(self, **fields: Any) -> str:
        return str(self.post("/users", {"email": f"user{next(NUMBERS)}@example.org", **fields})["id"])

    def program(self, project: str) -> str:
        return str(self.post(f"/projects/{project}/service_accounts", {"name": f"bot {next(NUMBERS)}"})["id"])

    def key(self, project: str) -> str:
        return str(self.post(f"/projects/{project}/api_keys", {"name": f"key {next(NUMBERS)}"})["id"])


def in_project(path: str, body: Any = None) -> Callable[[World], tuple[str, Any]]:
    return lambda world: (f"/projects/{world.project()}{path}", body)


def of_member(body: Any) -> Callable[[World], tuple[str, Any]]:
    def made(world: World) -> tuple[str, Any]:
        project, person = world.project(), world.user()
        world.post(f"/projects/{project}/users", {"user_id": person, "role": "member"})
        return f"/projects/{project}/users/{person}", body

    return made


def of_program(path: str, body: Any) -> Callable[[World], tuple[str, Any]]:
    def made(world: World) -> tuple[str, Any]:
        project = world.project()
        return f"/projects/{project}/service_accounts/{world.program(project)}{path}", body

    return made


def of_key(body: Any) -> Callable[[World], tuple[str, Any]]:
    def made(world: World) -> tuple[str, Any]:
        project = world.project()
        return f"/projects/{project}/api_keys/{world.key(project)}", body

    return made


def after(path: str, body: Any, then: Any = None) -> Callable[[World], tuple[str, Any]]:
    """What is changed must have been set before."""

    def made(world: World) -> tuple[str, Any]:
        whole = path.replace("PROJECT", world.project()) if "PROJECT" in path else path
        world.post(whole, body)
        return whole, then

    return made


def of_alert(path: str, body: Any) -> Callable[[World], tuple[str, Any]]:
    def made(world: World) -> tuple[str, Any]:
        whole = path.replace("PROJECT", world.project()) if "PROJECT" in path else path
        return f"{whole}/{world.post(whole, ALERT)['id']}", body

    return made


def member_to_be(world: World) -> tuple[str, Any]:
    return f"/projects/{world.project()}/users", {"user_id": world.user(), "role": "member"}


def budget(world: World) -> tuple[str, Any]:
    wanted = {"owner_kind": "project", "owner_id": world.project(), "meter": "tokens", "limit": 5}
    return f"/budgets/{world.post('/budgets', wanted)['id']}", None


PROJECT = "/v1/organization/projects/{project_id}"
EXAMPLES: dict[tuple[str, str], Callable[[World], tuple[str, Any]]] = {
    ("POST", "/v1/organization/projects"): lambda _: ("/projects", {"name": f"project {next(NUMBERS)}"}),
    ("POST", PROJECT): in_project("", {"name": f"renamed {next(NUMBERS)}"}),
    ("POST", f"{PROJECT}/archive"): in_project("/archive"),
    ("POST", f"{PROJECT}/users"): member_to_be,
    ("POST", f"{PROJECT}/users/{{user_id}}"): of_member({"role": "owner"}),
    ("DELETE", f"{PROJECT}/users/{{user_id}}"): of_member(None),
    ("POST", f"{PROJECT}/model_permissions"): in_project(
        "/model_permissions", {"mode": "allow_list", "model_ids": ["demo"]}
    ),
    ("DELETE", f"{PROJECT}/model_permissions"): in_project("/model_permissions"),
    ("POST", f"{PROJECT}/api_keys"): in_project(
        "/api_keys",
        {"name": "new", "allowance": {"requests_per_min": 5, "budgets": [{"meter": "tokens", "limit": 9}]}},
    ),
    ("POST", f"{PROJECT}/api_keys/{{key_id}}"): of_key({"expires_in_seconds": 60}),
    ("DELETE", f"{PROJECT}/api_keys/{{key_id}}"): of_key(None),
    ("POST", f"{PROJECT}/service_accounts"): in_project("/service_accounts", {"name": "robot"}),
    ("POST", f"{PROJECT}/service_accounts/{{account_id}}"): of_program("", {"name": "android"}),
    ("DELETE", f"{PROJECT}/service_accounts/{{account_id}}"): of_program("", None),
    ("POST", f"{PROJECT}/service_accounts/{{account_id}}/api_keys"): of_program("/api_keys", {"name": "second"}),
    ("POST", f"{PROJECT}/rate_limits/{{rate_limit_id:path}}"): in_project(
        "/rate_limits/rl-demo", {"max_requests_per_1_minute": 5}
    ),
    ("POST", f"{PROJECT}/spend_limit"): in_project("/spend_limit", LIMIT),
    ("DELETE", f"{PROJECT}/spend_limit"): after("/projects/PROJECT/spend_limit", LIMIT),
    ("POST", f"{PROJECT}/spend_alerts"): in_project("/spend_alerts", ALERT),
    ("POST", f"{PROJECT}/spend_alerts/{{alert_id}}"): of_alert("/projects/PROJECT/spend_alerts", ALERT),
    ("DELETE", f"{PROJECT}/spend_alerts/{{alert_id}}"): of_alert("/projects/PROJECT/spend_alerts", None),
    ("POST", "/v1/organization/spend_limit"): lambda _: ("/spend_limit", LIMIT | {"threshold_amount": 10**9}),
    ("DELETE", "/v1/organization/spend_limit"): after("/spend_limit", LIMIT | {"threshold_amount": 10**9}),
    ("POST", "/v1/organization/spend_alerts"): lambda _: ("/spend_alerts", ALERT),
    ("POST", "/v1/organization/spend_alerts/{alert_id}"): of_alert("/spend_alerts", ALERT),
    ("DELETE", "/v1/organization/spend_alerts/{alert_id}"): of_alert("/spend_alerts", None),
    ("POST", "/v1/organization/users"): lambda _: ("/users", {"email": f"user{next(NUMBERS)}@example.org"}),
    ("POST", "/v1/organization/users/{user_id}"): lambda world: (f"/users/{world.user()}", {"role": "admin"}),
    ("DELETE", "/v1/organization/users/{user_id}"): lambda world: (f"/users/{world.user()}", None),
    ("POST", "/v1/organization/users/{user_id}/password"): lambda world: (
        f"/users/{world.user()}/password",
        {"password": PASSWORD},
    ),
    ("POST", "/v1/organization/admin_api_keys"): lambda _: ("/admin_api_keys", {"name": f"ops {next(NUMBERS)}"}),
    ("DELETE", "/v1/organization/admin_api_keys/{key_id}"): lambda world: (
        f"/admin_api_keys/{world.post('/admin_api_keys', {'name': f'ops {next(NUMBERS)}'})['id']}",
        None,
    ),
    ("POST", "/v1/organization/budgets"): lambda world: (
        "/budgets",
        {"owner_kind": "project", "owner_id": world.project(), "meter": "tokens", "limit": 5, "alerts_at": [3]},
    ),
    ("DELETE", "/v1/organization/budgets/{budget_id}"): budget,
    ("POST", "/v1/organization/limits"): lambda world: (
        "/limits",
        {"owner_kind": "project", "owner_id": world.project(), "requests_per_min": 500},
    ),
    ("POST", "/v1/organization/prices"): lambda _: (
        "/prices",
        {"prices": [{"model": "other", "meter": "input", "micros_per_million": 5}]},
    ),
}
LOGOUT = ("POST", "/v1/console/logout")


def rows(server: Live) -> int:
    checked = server.http.get("/v1/organization/audit_logs/verify").json()
    assert checked["problem"] is None
    return int(checked["rows"])


def test_every_route_that_changes_something_has_an_example() -> None:
    assert EXAMPLES.keys() == CHANGES.keys() - {LOGOUT}


@pytest.mark.parametrize(("method", "path"), sorted(EXAMPLES))
def test_a_change_leaves_exactly_one_row(server: Live, method: str, path: str) -> None:
    place, body = EXAMPLES[method, path](World(server))
    before = rows(server)
    response = server.http.request(method, f"/v1/organization{place}", json=body)
    assert response.status_code == 200, response.text
    assert rows(server) == before + 1


@pytest.mark.parametrize("path", sorted(path for method, path in ROUTES if method == "GET"))
def test_reading_leaves_none(server: Live, path: str) -> None:
    before = rows(server)
    whole = path.replace("{project_id}", "proj_default").replace("{user_id}", "user_owner").replace("{key_id}", "none")
    response = server.http.get(f"{whole}?start_time=1" if "/usage/" in path or "costs" in path else whole)
    assert response.status_code in (200, 400, 404), response.text
    assert rows(server) == before


@pytest.mark.parametrize(("method", "path"), sorted(EXAMPLES))
def test_a_change_that_is_refused_leaves_none(server: Live, method: str, path: str) -> None:
    before = rows(server)
    whole = path.replace(":path", "")
    response = server.http.request(method, whole, json={"no_such_field": 1})
    assert response.status_code in (400, 404), response.text
    assert rows(server) == before


def test_a_change_of_a_key_keeps_what_another_has_changed_meanwhile(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scopes that one administrator takes away do not come back with the weight that another sets."""
    world = World(server)
    project = world.project()
    key = world.key(project)
    changeable = keys._changeable

    async def changed_meanwhile(call: Call) -> Key:
        found = await changeable(call)
        narrower = replace(found.grant, scopes=("class:batch",))
        await call.change(lambda: update_key(project, key, grant=narrower))
        return found

    monkeypatch.setattr(keys, "_changeable", changed_meanwhile)
    told = world.post(f"/projects/{project}/api_keys/{key}", {"weight": 2.0})["x_nimbos"]
    assert (told["scopes"], told["weight"]) == (["class:batch"], 2.0)


def test_a_limit_is_for_a_model_whose_id_can_be_one(server: Live) -> None:
    before = rows(server)
    for model in ("x" * 301, ""):
        body = {"owner_kind": "project", "owner_id": "default", "model": model, "concurrent": 1}
        assert server.post("/v1/organization/limits", body).status_code == 400
    path = f"/v1/organization/projects/proj_default/rate_limits/rl-{'x' * 3000}"
    assert server.post(path, {"max_requests_per_1_minute": 1}).status_code == 400
    assert rows(server) == before


HOSTILE = ["%00", "%ff%fe", "..%2f..", "%F0%9F%92%A9", "'%20OR%201=1--", "a" * 3000, "%7B%7D", "-1"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_paths_and_parameters_are_refused_and_change_nothing(server: Live, text: str) -> None:
    before = rows(server)
    for method, path in sorted(ROUTES.keys() - {LOGOUT}):
        whole = re.sub(r"{[^}]+}", text, path)
        body = {"no_such_field": 1} if method == "POST" else None
        for target in (whole, f"{whole}?after={text}&limit={text}", f"{whole}?effective_at[gt]={text}&by={text}"):
            if method == "GET" or target != path:
                response = server.http.request(method, target, json=body)
                assert response.status_code in (200, 400, 404), (method, target[:100], response.text)
    assert rows(server) == before


@pytest.mark.parametrize("value", ["a\x00b", "\u202e", "x" * 400, "", " ", "\ud800", 1e300, -1, [], {"a": 1}, True])
def test_hostile_values_in_bodies_are_refused(server: Live, value: Any) -> None:
    world = World(server)
    before = rows(server)
    text = json.dumps(value)
    for place, field in (
        ("/projects", "name"),
        ("/users", "email"),
        ("/admin_api_keys", "name"),
        ("/projects/proj_default/api_keys", "name"),
        ("/projects/proj_default/users", "user_id"),
        ("/projects/proj_default/service_accounts", "name"),
    ):
        content = f'{{"{field}": {text}, "role": "member"}}' if "users" in place else f'{{"{field}": {text}}}'
        response = world.server.http.post(
            f"/v1/organization{place}", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code in (400, 404), (place, response.text)
    assert rows(server) == before


# --- roles


class Person:
    """Somebody who logged in to the console."""

    def __init__(self, server: Live, role: Role) -> None:
        email = f"{role}{next(NUMBERS)}@example.org"
        self.id = World(server).user(email=email, role=role, password=PASSWORD)
        self.http = httpx2.Client(base_url=server.url, headers={"origin": server.url}, timeout=60)
        done = self.http.post("/v1/console/login", json={"name": email, "password": PASSWORD})
        assert done.status_code == 200, done.text

    def status(self, route: AdminRoute) -> int:
        whole = route.path.replace(":path", "").replace("{project_id}", "proj_none")
        return self.http.request(route.method, whole, json={"no_such_field": 1}).status_code


@pytest.mark.parametrize("role", list(Role))
def test_every_route_holds_to_the_table_of_roles(server: Live, role: Role) -> None:
    person = Person(server, role)
    wrong = {}
    for key, route in ROUTES.items():
        if key == LOGOUT or route.action is Action.SELF:
            continue
        allowed = person.status(route) != 403
        if allowed != may(role, route.action):
            wrong[key] = allowed
    person.http.close()
    assert wrong == {}


def test_only_owners_touch_owners(server: Live) -> None:
    world = World(server)
    chief = world.user(role="owner")
    boss = Person(server, Role.ADMIN)
    place = f"/v1/organization/users/{chief}"
    assert boss.http.post(place, json={"role": "reader"}).status_code == 403
    assert boss.http.delete(place).status_code == 403
    assert boss.http.post(f"{place}/password", json={"password": PASSWORD}).status_code == 403
    assert boss.http.post("/v1/organization/users", json={"email": "x@y.z", "role": "owner"}).status_code == 403
    other = world.user(role="member")
    assert boss.http.post(f"/v1/organization/users/{other}", json={"role": "owner"}).status_code == 403
    assert boss.http.post(f"/v1/organization/users/{other}", json={"role": "admin"}).status_code == 200
    made = world.post("/admin_api_keys", {"name": f"ops {next(NUMBERS)}"})
    assert boss.http.delete(f"/v1/organization/admin_api_keys/{made['id']}").status_code == 403
    boss.http.close()


def test_only_owners_give_an_owners_rights_to_a_key(server: Live) -> None:
    world = World(server)
    boss, keys = Person(server, Role.ADMIN), "/v1/organization/projects/proj_default/api_keys"
    chief = world.user(role="owner")
    for owner in (chief, "user_owner"):
        wanted = {"name": f"up {next(NUMBERS)}", "user_id": owner}
        assert boss.http.post(keys, json={**wanted, "scopes": ["admin"]}).status_code == 403
        plain = boss.http.post(keys, json=wanted).json()
        assert boss.http.post(f"{keys}/{plain['id']}", json={"scopes": ["admin"]}).status_code == 403
        assert server.post(f"{keys}/{plain['id']}", {"scopes": ["admin"]}).status_code == 200
    own = {"name": f"own {next(NUMBERS)}", "scopes": ["admin"]}
    assert boss.http.post(keys, json=own).status_code == 200
    boss.http.close()


def test_what_runs_now_and_the_metrics_are_for_those_who_may_see_everything(server: Live) -> None:
    for role in Role:
        person = Person(server, role)
        for path in ("/v1/organization/live", "/metrics"):
            assert (person.http.get(path).status_code == 200) == may(role, Action.SEE), (role, path)
        person.http.close()


def test_a_member_makes_lists_and_revokes_keys_of_its_own_and_no_others(server: Live) -> None:
    world = World(server)
    ann = Person(server, Role.MEMBER)  # a member of the default project from the start
    keys = "/v1/organization/projects/proj_default/api_keys"
    others = world.key("proj_default")
    made = ann.http.post(keys, json={"name": f"mine {next(NUMBERS)}"}).json()
    assert made["owner"]["user"]["id"] == ann.id
    assert [key["id"] for key in ann.http.get(keys).json()["data"]] == [made["id"]]
    assert ann.http.get(f"{keys}/{others}").status_code == 404
    assert ann.http.delete(f"{keys}/{others}").status_code == 404
    assert ann.http.post(keys, json={"name": "for you", "user_id": "user_owner"}).status_code == 403
    assert ann.http.post(keys, json={"name": "root", "scopes": ["admin"]}).status_code == 403
    assert ann.http.post(keys, json={"name": "rich", "allowance": {"requests_per_min": 10**6}}).status_code == 403
    assert ann.http.post(keys, json={"name": "heavy", "weight": 50}).status_code == 403
    elsewhere = f"/v1/organization/projects/{world.project()}/api_keys"
    assert ann.http.post(elsewhere, json={"name": "there"}).status_code == 403
    asked = httpx2.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "demo", "messages": user("hi")},
        headers={"x-api-key": made["value"]},
    )
    assert asked.status_code == 200
    assert ann.http.delete(f"{keys}/{made['id']}").status_code == 200
    ann.http.close()


def test_an_owner_of_a_project_runs_it_and_no_other(server: Live) -> None:
    world = World(server)
    ann, project, newcomer = Person(server, Role.MEMBER), world.project(), world.user()
    place = f"/v1/organization/projects/{project}"
    world.post(f"/projects/{project}/users", {"user_id": ann.id, "role": "owner"})
    assert ann.http.post(f"{place}/users", json={"user_id": newcomer, "role": "member"}).status_code == 200
    assert ann.http.post(f"{place}/service_accounts", json={"name": "robot"}).status_code == 200
    assert ann.http.post(f"{place}/api_keys", json={"name": "hers", "user_id": newcomer}).status_code == 200
    assert len(ann.http.get(f"{place}/api_keys").json()["data"]) == 2
    assert ann.http.post(f"{place}/archive").status_code == 403
    assert ann.http.post(f"{place}/spend_limit", json=LIMIT).status_code == 403
    assert ann.http.get(f"/v1/organization/projects/{world.project()}").status_code == 403
    ann.http.close()


def test_a_key_without_the_scope_admin_administers_nothing(server: Live) -> None:
    made = World(server).post("/projects/proj_default/api_keys", {"name": f"plain {next(NUMBERS)}"})
    for method, path in sorted(ROUTES):
        response = httpx2.request(
            method, server.url + path.replace(":path", ""), headers={"authorization": f"Bearer {made['value']}"}
        )
        assert response.status_code == 403, (method, path)
        assert "admin" in response.json()["error"]["message"]


# --- secrets


def test_a_secret_is_in_one_answer_and_nowhere_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secrets: list[str] = []
    with serving(tmp_path / "home", {"demo": DEMO}, database_url="") as server:
        world = World(server)
        project = world.project()
        secrets.append(world.post(f"/projects/{project}/api_keys", {"name": "a"})["value"])
        secrets.append(world.post(f"/projects/{project}/service_accounts", {"name": "b"})["api_key"]["value"])
        program = world.program(project)
        secrets.append(world.post(f"/projects/{project}/service_accounts/{program}/api_keys", {})["value"])
        secrets.append(world.post("/admin_api_keys", {"name": "c"})["value"])
        person = Person(server, Role.ADMIN)
        secrets += [PASSWORD, *person.http.cookies.values()]
        unknown = "nb-" + "guessed" * 6
        shown = [
            httpx2.get(server.url + path, headers={"x-api-key": secret}).text
            for secret in [*secrets, unknown]
            for path in ("/v1/models", "/v1/organization/projects", "/v1/nothing")
        ]
        wrong = person.http.post("/v1/console/login", json={"name": "owner", "password": unknown})
        shown.append(wrong.text)
        shown += [server.http.get(path).text for path in ("/metrics", "/v1/organization/api_keys")]
        shown += [server.http.get("/v1/organization/audit_logs?limit=100").text]
        shown += [server.http.get(f"/v1/organization/projects/{project}/api_keys").text]
        person.http.close()
    logged = "".join(capfd.readouterr())
    stored = b"".join(file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file())
    assert "ask.settled" in logged or "http.request" in logged
    for secret in [*secrets, unknown]:
        assert len(secret) > 15
        assert secret not in logged
        assert secret not in "".join(shown)
        assert secret.encode() not in stored
        assert secret[3:].encode() not in stored
