"""OpenAI's Admin API by the official client: every part that is served, held to the client's own idea of the shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.resources.admin.organization import Organization

from tests.conftest import DEMO
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO}) as running:
        yield running


@pytest.fixture(scope="module")
def admin(server: Live) -> Iterator[Organization]:
    """It checks every answer against its own types."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="nb-not-this-one",
        admin_api_key=OWNER_SECRET,
        max_retries=0,
        timeout=PATIENCE_S,
        _strict_response_validation=True,
    ) as client:
        yield client.admin.organization


def ask(server: Live, secret: str, **fields: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0, timeout=PATIENCE_S) as client:
        return client.chat.completions.create(model="demo", messages=user("hi"), **fields)


def project_of(admin: Organization, name: str) -> Any:
    return admin.projects.create(name=name)


def test_projects_are_made_renamed_listed_and_archived(admin: Organization) -> None:
    made = project_of(admin, "circle")
    assert (made.name, made.status, made.archived_at) == ("circle", "active", None)
    assert admin.projects.retrieve(made.id) == made
    assert admin.projects.update(made.id, name="round").name == "round"
    assert made.id in [project.id for project in admin.projects.list()]
    archived = admin.projects.archive(made.id)
    assert archived.status == "archived"
    assert archived.archived_at is not None
    assert made.id not in [project.id for project in admin.projects.list()]
    assert made.id in [project.id for project in admin.projects.list(include_archived=True)]
    with pytest.raises(openai.ConflictError):
        admin.projects.update(made.id, name="again")


def test_lists_come_in_pages(admin: Organization) -> None:
    made = {project_of(admin, f"page {number}").id for number in range(5)}
    page = admin.projects.list(limit=2)
    assert len(page.data) == 2
    assert page.has_next_page()
    assert made <= {project.id for project in page}
    with pytest.raises(openai.BadRequestError):
        admin.projects.list(limit=101)


def test_a_service_account_brings_its_key_once_and_the_key_works(server: Live, admin: Organization) -> None:
    project = project_of(admin, "programs")
    made = admin.projects.service_accounts.create(project.id, name="robot")
    assert made.api_key is not None
    secret = made.api_key.value
    assert secret.startswith("nb-")
    assert len(secret) == 3 + 43
    assert ask(server, secret).choices[0].message.content == "Hello there, friend!"
    (key,) = admin.projects.api_keys.list(project.id)
    assert key.id == made.api_key.id
    assert key.redacted_value == f"{secret[:7]}...{secret[-4:]}"
    assert key.owner.service_account is not None
    assert key.owner.service_account.id == made.id
    assert key.owner_project_access == "active"
    assert admin.projects.api_keys.retrieve(key.id, project_id=project.id).name == "robot"
    renamed = admin.projects.service_accounts.update(made.id, project_id=project.id, name="android", role="owner")
    assert (renamed.name, renamed.role) == ("android", "owner")
    assert [one.id for one in admin.projects.service_accounts.list(project.id)] == [made.id]
    assert admin.projects.service_accounts.retrieve(made.id, project_id=project.id).name == "android"
    assert admin.projects.service_accounts.delete(made.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        ask(server, secret)


def test_a_service_account_gets_more_keys_with_scopes_and_expiry(server: Live, admin: Organization) -> None:
    project = project_of(admin, "more keys")
    account = admin.projects.service_accounts.create(project.id, name="bot", create_service_account_only=True)
    assert (account.role, account.api_key) == ("none", None)
    keys = admin.projects.service_accounts.api_keys
    with pytest.raises(openai.ConflictError):
        keys.create(account.id, project_id=project.id, name="early")
    admin.projects.service_accounts.update(account.id, project_id=project.id, role="member")
    made = keys.create(
        account.id, project_id=project.id, name="narrow", scopes=["model:other", "class:batch"], expires_in_seconds=60
    )
    assert made.expires_at is not None
    assert 0 < made.expires_at - time.time() <= 61
    with pytest.raises(openai.BadRequestError, match="Unknown scope"):
        keys.create(account.id, project_id=project.id, scopes=["api.all.read"])
    changed = admin.projects.api_keys.update(made.id, project_id=project.id, scopes=[], expires_in_seconds=600)
    assert changed.expires_at is not None
    assert changed.expires_at > made.expires_at
    assert ask(server, made.value).choices
    assert admin.projects.api_keys.delete(made.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError, match="narrow"):
        ask(server, made.value)


def test_people_of_the_organisation_and_of_a_project(server: Live, admin: Organization) -> None:
    project = project_of(admin, "people")
    added = server.post("/v1/organization/users", {"email": "Ann@Example.org", "name": "Ann", "role": "reader"}).json()
    assert added["email"] == "ann@example.org"
    assert [one.id for one in admin.users.list(emails=["ann@example.org"])] == [added["id"]]
    assert admin.users.update(added["id"], role="member").role == "member"
    member = admin.projects.users.create(project.id, user_id=added["id"], role="member")
    assert (member.email, member.role) == ("ann@example.org", "member")
    with pytest.raises(openai.ConflictError):
        admin.projects.users.create(project.id, email="ann@example.org", role="member")
    assert admin.projects.users.update(added["id"], project_id=project.id, role="owner").role == "owner"
    assert [one.id for one in admin.projects.users.list(project.id)] == [added["id"]]
    shown = admin.users.retrieve(added["id"])
    assert shown.projects is not None
    assert [(one.id, one.role) for one in shown.projects.data] == [(project.id, "owner")]
    assert admin.projects.users.retrieve(added["id"], project_id=project.id).role == "owner"
    assert admin.projects.users.delete(added["id"], project_id=project.id).deleted
    assert admin.users.delete(added["id"]).deleted
    with pytest.raises(openai.NotFoundError):
        admin.users.retrieve(added["id"])


def test_the_last_owner_stays(admin: Organization) -> None:
    with pytest.raises(openai.ConflictError):
        admin.users.delete("user_owner")
    with pytest.raises(openai.ConflictError):
        admin.users.update("user_owner", role="reader")


def test_rate_limits_are_by_model(server: Live, admin: Organization) -> None:
    project = project_of(admin, "rates")
    secret = admin.projects.service_accounts.create(project.id, name="fast").api_key
    assert secret is not None
    (everything,) = admin.projects.rate_limits.list_rate_limits(project.id)
    assert (everything.model, everything.max_requests_per_1_minute) == ("*", 10**12)
    set_to = admin.projects.rate_limits.update_rate_limit("rl-demo", project_id=project.id, max_requests_per_1_minute=2)
    assert (set_to.id, set_to.model, set_to.max_tokens_per_1_minute) == ("rl-demo", "demo", 10**12)
    assert {one.model for one in admin.projects.rate_limits.list_rate_limits(project.id)} == {"*", "demo"}
    for _ in range(2):
        ask(server, secret.value)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(server, secret.value)
    assert "requests" in caught.value.message
    assert int(caught.value.response.headers["retry-after"]) >= 1
    admin.projects.rate_limits.update_rate_limit("rl-demo", project_id=project.id, max_requests_per_1_minute=10**12)
    ask(server, secret.value)
    with pytest.raises(openai.BadRequestError, match="budget of tokens a day"):
        admin.projects.rate_limits.update_rate_limit("rl-demo", project_id=project.id, batch_1_day_max_input_tokens=5)


def test_a_models_name_with_a_slash_has_a_rate_limit_too(admin: Organization) -> None:
    project = project_of(admin, "slashes")
    limits = admin.projects.rate_limits
    set_to = limits.update_rate_limit("rl-org/model:7b", project_id=project.id, max_tokens_per_1_minute=5)
    assert (set_to.model, set_to.max_tokens_per_1_minute) == ("org/model:7b", 5)


def test_model_permissions_hold(server: Live, admin: Organization) -> None:
    project = project_of(admin, "models")
    made = admin.projects.service_accounts.create(project.id, name="reader").api_key
    assert made is not None
    permissions = admin.projects.model_permissions
    with pytest.raises(openai.NotFoundError):
        permissions.retrieve(project.id)
    assert permissions.update(project.id, mode="allow_list", model_ids=["other"]).mode == "allow_list"
    with pytest.raises(openai.PermissionDeniedError):
        ask(server, made.value)
    assert permissions.update(project.id, mode="deny_list", model_ids=["other"]).api_model_ids == ["other"]
    assert ask(server, made.value).choices
    permissions.update(project.id, mode="deny_list", model_ids=["demo"])
    with pytest.raises(openai.PermissionDeniedError):
        ask(server, made.value)
    assert permissions.delete(project.id).deleted
    assert ask(server, made.value).choices


def test_a_spend_limit_stops_and_tells(server: Live, admin: Organization) -> None:
    project = project_of(admin, "spending")
    made = admin.projects.service_accounts.create(project.id, name="spender").api_key
    assert made is not None
    limits = admin.projects.spend_limit
    with pytest.raises(openai.NotFoundError):
        limits.retrieve(project.id)
    limit = limits.update(project.id, threshold_amount=1250, currency="USD", interval="month")
    assert (limit.threshold_amount, limit.enforcement.status) == (1250, "inactive")
    assert ask(server, made.value).choices
    assert limits.update(project.id, threshold_amount=0, currency="USD", interval="month").threshold_amount == 0
    assert limits.retrieve(project.id).enforcement.status == "enforcing"
    assert limits.delete(project.id).deleted
    with pytest.raises(openai.NotFoundError):
        limits.retrieve(project.id)


def test_a_spend_limit_of_the_organisation(admin: Organization) -> None:
    limit = admin.spend_limit.update(threshold_amount=100_000, currency="USD", interval="month")
    assert limit.object == "organization.spend_limit"
    assert admin.spend_limit.retrieve().threshold_amount == 100_000
    assert admin.spend_limit.delete().deleted


CHANNEL: Any = {"type": "email", "recipients": ["ann@example.org"], "subject_prefix": "Nimbos"}


def test_spend_alerts_of_a_project_and_of_the_organisation(admin: Organization) -> None:
    project = project_of(admin, "alerts")
    wanted: Any = {"currency": "USD", "interval": "month", "notification_channel": CHANNEL}
    alerts = admin.projects.spend_alerts
    made = [alerts.create(project.id, threshold_amount=amount, **wanted) for amount in (100, 200, 300)]
    assert made[0].notification_channel.recipients == ["ann@example.org"]
    assert [one.id for one in alerts.list(project.id, order="asc", limit=2)] == [one.id for one in made]
    assert alerts.retrieve(made[1].id, project_id=project.id).threshold_amount == 200
    assert alerts.update(made[1].id, project_id=project.id, threshold_amount=250, **wanted).threshold_amount == 250
    assert alerts.delete(made[1].id, project_id=project.id).deleted
    other = project_of(admin, "other alerts")
    with pytest.raises(openai.NotFoundError):
        alerts.retrieve(made[0].id, project_id=other.id)
    mine = admin.spend_alerts.create(threshold_amount=5000, **wanted)
    assert mine.object == "organization.spend_alert"
    assert admin.spend_alerts.retrieve(mine.id).threshold_amount == 5000
    assert admin.spend_alerts.update(mine.id, threshold_amount=6000, **wanted).threshold_amount == 6000
    assert [one.id for one in admin.spend_alerts.list()] == [mine.id]
    assert admin.spend_alerts.delete(mine.id).deleted


def test_keys_that_administer(server: Live, admin: Organization) -> None:
    made = admin.admin_api_keys.create(name="ops", expires_in_seconds=3600)
    assert made.value.startswith("nb-")
    assert admin.admin_api_keys.retrieve(made.id).redacted_value == f"{made.value[:7]}...{made.value[-4:]}"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", admin_api_key=made.value) as other:
        assert other.admin.organization.projects.list().data
    assert made.id in [key.id for key in admin.admin_api_keys.list()]
    assert admin.admin_api_keys.delete(made.id).deleted
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", admin_api_key=made.value) as other,
        pytest.raises(openai.AuthenticationError, match="revoked"),
    ):
        other.admin.organization.projects.list()


def test_usage_is_what_was_told_by_project_key_user_model_and_class(server: Live, admin: Organization) -> None:
    project = project_of(admin, "usage")
    made = admin.projects.service_accounts.create(project.id, name="counted").api_key
    assert made is not None
    told = [ask(server, made.value).usage, ask(server, made.value, service_tier="flex").usage]
    start = int(time.time()) - 60
    page = admin.usage.completions(
        start_time=start, project_ids=[project.id], group_by=["project_id", "api_key_id", "model", "batch"]
    )
    results = [result for bucket in page.data for result in bucket.results]
    assert {(one.project_id, one.api_key_id, one.model) for one in results} == {(project.id, made.id, "demo")}  # type: ignore[union-attr]
    assert sorted(one.batch for one in results) == [False, True]  # type: ignore[union-attr,type-var]
    assert sum(one.num_model_requests for one in results) == 2  # type: ignore[union-attr]
    assert sum(one.input_tokens for one in results) == sum(one.prompt_tokens for one in told)  # type: ignore[union-attr]
    assert sum(one.output_tokens for one in results) == sum(one.completion_tokens for one in told)  # type: ignore[union-attr]
    only = admin.usage.completions(start_time=start, project_ids=[project.id], batch=True)
    assert sum(result.num_model_requests for bucket in only.data for result in bucket.results) == 1  # type: ignore[union-attr]
    minutes = admin.usage.completions(start_time=start, project_ids=[project.id], bucket_width="1m")
    assert sum(result.num_model_requests for bucket in minutes.data for result in bucket.results) == 2  # type: ignore[union-attr]


def test_buckets_come_in_pages(admin: Organization) -> None:
    start = int(time.time()) - 10 * 86_400
    first = admin.usage.completions(start_time=start, limit=3)
    assert (len(first.data), first.has_more) == (3, True)
    assert first.next_page is not None
    second = admin.usage.completions(start_time=start, limit=3, page=first.next_page)
    assert second.data[0].start_time == first.data[-1].end_time
    last = admin.usage.completions(start_time=start, limit=31)
    assert (last.has_more, last.next_page, len(last.data)) == (False, None, 11)


@pytest.mark.parametrize(
    "name",
    [
        "embeddings",
        "moderations",
        "images",
        "audio_speeches",
        "audio_transcriptions",
        "vector_stores",
        "code_interpreter_sessions",
        "file_search_calls",
        "web_search_calls",
        "decisions",
    ],
)
def test_what_was_not_used_is_empty_buckets(admin: Organization, name: str) -> None:
    page = getattr(admin.usage, name)(start_time=int(time.time()) - 3600, bucket_width="1h")
    assert 1 <= len(page.data) <= 3
    assert [bucket.results for bucket in page.data] == [[]] * len(page.data)


def test_costs_are_money_by_day(server: Live, admin: Organization) -> None:
    prices = [{"meter": "input", "micros_per_million": 2_000_000}, {"meter": "output", "micros_per_million": 8_000_000}]
    assert server.post("/v1/organization/prices", {"prices": prices}).status_code == 200
    project = project_of(admin, "costs")
    made = admin.projects.service_accounts.create(project.id, name="costly").api_key
    assert made is not None
    told = ask(server, made.value).usage
    server.post("/v1/organization/prices", {"replace": True})
    page = admin.usage.costs(
        start_time=int(time.time()) - 60, project_ids=[project.id], group_by=["project_id", "line_item"]
    )
    (result,) = [result for bucket in page.data for result in bucket.results]
    micros = 2 * told.prompt_tokens + 8 * told.completion_tokens
    assert result.amount is not None  # type: ignore[union-attr]
    assert result.amount.value == micros / 1_000_000  # type: ignore[union-attr]
    assert result.line_item == "demo"  # type: ignore[union-attr]


def test_the_audit_log_says_who_did_what_newest_first(admin: Organization) -> None:
    project = project_of(admin, "watched")
    admin.projects.update(project.id, name="watched closely")
    entries = list(admin.audit_logs.list(project_ids=[project.id]))
    assert [entry.type for entry in entries] == ["project.updated", "project.created"]
    updated, created = entries
    assert created.actor is not None
    assert created.actor.type == "api_key"
    assert created.actor.api_key is not None
    assert created.actor.api_key.id == "key_owner"
    assert created.project_created is not None
    assert created.project_created.data is not None
    assert created.project_created.data.name == "watched"
    assert updated.model_extra is not None
    assert updated.model_extra["x_nimbos"]["before"]["name"] == "watched"
    assert updated.model_extra["x_nimbos"]["after"]["name"] == "watched closely"


def test_budgets_and_limits_of_a_projects_keys_are_in_its_audit_log(server: Live, admin: Organization) -> None:
    project = project_of(admin, "audited")
    key = server.post(f"/v1/organization/projects/{project.id}/api_keys", {"name": "audited key"}).json()
    owner = {"owner_kind": "key", "owner_id": key["id"]}
    budget = server.post("/v1/organization/budgets", {**owner, "meter": "tokens", "limit": 5}).json()
    assert server.post("/v1/organization/limits", {**owner, "concurrent": 2}).status_code == 200
    assert server.http.delete(f"/v1/organization/budgets/{budget['id']}").status_code == 200
    entries = list(admin.audit_logs.list(project_ids=[project.id]))
    actions = [entry.model_extra["x_nimbos"]["action"] for entry in entries if entry.model_extra is not None]
    assert actions == ["budget.deleted", "rate_limit.updated", "budget.updated", "api_key.created", "project.created"]


def test_a_project_that_is_named_like_anothers_id_takes_nothing_from_it(admin: Organization) -> None:
    project = project_of(admin, "first come")
    other = project_of(admin, project.id)
    limit: Any = {"threshold_amount": 100, "currency": "USD", "interval": "month"}
    admin.projects.spend_limit.update(project.id, **limit)
    assert admin.projects.spend_limit.retrieve(project.id).threshold_amount == 100
    with pytest.raises(openai.NotFoundError):
        admin.projects.spend_limit.retrieve(other.id)


def test_the_audit_log_has_openais_filters(admin: Organization) -> None:
    now = int(time.time())
    project = project_of(admin, "filtered")
    logs = admin.audit_logs
    assert [one.id for one in logs.list(resource_ids=[project.id], event_types=["project.archived"])] == []
    assert [one.type for one in logs.list(resource_ids=[project.id], actor_ids=["key_owner"])] == ["project.created"]
    assert list(logs.list(resource_ids=[project.id], effective_at={"lt": now - 60})) == []
    assert len(list(logs.list(resource_ids=[project.id], effective_at={"gte": now - 60, "lte": now + 60}))) == 1
    assert list(logs.list(actor_emails=["nobody@example.org"])) == []
    everything = list(logs.list(limit=3))
    assert len(everything) > 6
    assert len({one.id for one in everything}) == len(everything)
    assert [one.id for one in logs.list(before=everything[2].id, limit=2).data] == [one.id for one in everything[:2]]


def test_the_chain_verifies(server: Live) -> None:
    checked = server.http.get("/v1/organization/audit_logs/verify").json()
    assert checked["problem"] is None
    assert checked["rows"] > 0


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/organization/projects", {"name": "x", "colour": "red"}, "colour"),
        ("/v1/organization/projects", {"name": "x", "geography": "EU"}, "geography"),
        ("/v1/organization/projects", {"name": ""}, "name"),
        ("/v1/organization/projects", {"name": "a\nb"}, "name"),
        ("/v1/organization/users", {"email": "nobody"}, "email"),
        ("/v1/organization/users", {"email": "a@b.c", "password": "short"}, "password"),
        ("/v1/organization/budgets", {"owner_kind": "project", "meter": "tokens", "limit": 5}, "owner_id"),
        ("/v1/organization/budgets", {"owner_kind": "organisation", "meter": "tokens"}, "limit"),
        ("/v1/organization/prices", {"prices": [{"meter": "smoke", "micros_per_million": 1}]}, "meter"),
    ],
)
def test_a_wrong_field_is_named(server: Live, path: str, body: dict[str, Any], named: str) -> None:
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named


def test_an_unknown_query_parameter_is_named(server: Live) -> None:
    response = server.http.get("/v1/organization/projects?sort=up")
    assert response.status_code == 400
    assert "sort" in response.json()["error"]["message"]


def test_the_example_in_the_docs_runs(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "team-keys.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    example = example.replace("http://127.0.0.1:8000", server.url).replace("nb-the-owners-key", OWNER_SECRET)
    named: dict[str, Any] = {}
    exec(compile(example, "team-keys.md", "exec"), named)
    named["client"].close()
    assert any(line.startswith("nb-") for line in capsys.readouterr().out.splitlines())


def test_what_is_not_served_is_a_clear_404(admin: Organization) -> None:
    with pytest.raises(openai.NotFoundError, match="no route GET /v1/organization/invites"):
        admin.invites.list()
