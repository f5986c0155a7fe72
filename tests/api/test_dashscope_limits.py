"""Limits, budgets and scopes as DashScope's and Ollama's clients are told of them; and their routes are counted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest
from openai.resources.admin.organization import Organization

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package's own
    import dashscope
    from dashscope.api_entities.http_request import close_shared_sync_session

from tests.conftest import DEMO
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO}) as running:
        yield running


@pytest.fixture(scope="module")
def admin(server: Live) -> Iterator[Organization]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="-", admin_api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client.admin.organization


@pytest.fixture(autouse=True)
def official(server: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dashscope, "base_http_api_url", f"{server.url}/api/v1")
    yield
    close_shared_sync_session()


class Holder:
    """A project with one key, and both clients with it."""

    def __init__(self, server: Live, admin: Organization, name: str) -> None:
        self.project = admin.projects.create(name=name)
        made = admin.projects.service_accounts.create(self.project.id, name=name).api_key
        assert made is not None
        self.secret = made.value
        self.headers = {"authorization": f"Bearer {self.secret}"}
        self.server = server

    def generate(self, **fields: Any) -> Any:
        return dashscope.Generation.call(model="demo", prompt="hi", api_key=self.secret, **fields)

    def chat(self) -> Any:
        with ollama.Client(host=self.server.url, headers=self.headers, timeout=PATIENCE_S) as client:
            return client.chat("demo", messages=user("hi"))

    def refused_chat(self, status: int) -> str:
        with pytest.raises(ollama.ResponseError) as caught:
            self.chat()
        assert caught.value.status_code == status
        return str(caught.value.error)


def test_a_limit_of_requests_is_told_with_the_wait(server: Live, admin: Organization) -> None:
    holder = Holder(server, admin, "requests")
    admin.projects.rate_limits.update_rate_limit("rl-demo", project_id=holder.project.id, max_requests_per_1_minute=2)
    assert holder.generate().headers["x-ratelimit-remaining-requests"] == "1"
    assert holder.chat().done
    response = holder.generate()
    assert (response.status_code, response.code) == (429, "Throttling.RateQuota")
    assert "requests" in response.message
    assert int(response.headers["retry-after"]) >= 1
    assert response.request_id.startswith("ask_")
    (event,) = holder.generate(stream=True)
    assert (event.status_code, event.code) == (429, "Throttling.RateQuota")
    assert "requests" in holder.refused_chat(429)


def test_a_limit_of_tokens_has_a_code_of_its_own(server: Live, admin: Organization) -> None:
    holder = Holder(server, admin, "tokens")
    limits = admin.projects.rate_limits
    limits.update_rate_limit("rl-demo", project_id=holder.project.id, max_tokens_per_1_minute=3)
    answers = [holder.generate() for _ in range(5)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.code for answer in refused} == {"Throttling.AllocationQuota"}
    assert "tokens" in holder.refused_chat(429)


def test_a_spent_budget_is_an_arrearage(server: Live, admin: Organization) -> None:
    holder = Holder(server, admin, "spent")
    budget = {"owner_kind": "project", "owner_id": holder.project.id, "meter": "tokens", "limit": 4, "period": "total"}
    assert server.post("/v1/organization/budgets", budget).status_code == 200
    first = holder.generate()
    assert (first.status_code, first.output.finish_reason) == (200, "length")
    assert first.usage.total_tokens == 4
    response = holder.generate()
    assert (response.status_code, response.code) == (429, "Arrearage")
    assert "budget" in response.message
    assert response.headers["x-should-retry"] == "false"
    assert "budget" in holder.refused_chat(429)


def test_a_model_that_a_key_may_not_ask_is_neither_answered_nor_shown(server: Live, admin: Organization) -> None:
    holder = Holder(server, admin, "elsewhere")
    admin.projects.model_permissions.update(holder.project.id, mode="allow_list", model_ids=["other"])
    response = holder.generate()
    assert (response.status_code, response.code) == (403, "AccessDenied")
    assert "demo" in holder.refused_chat(403)
    with ollama.Client(host=server.url, headers=holder.headers, timeout=PATIENCE_S) as client:
        assert client.list().models == []
        for refused in (lambda: client.show("demo"), lambda: client.chat("demo"), lambda: client.generate("demo")):
            with pytest.raises(ollama.ResponseError) as caught:
                refused()
            assert caught.value.status_code == 403


def test_only_keys_that_administer_fetch_and_remove_models(server: Live, admin: Organization) -> None:
    holder = Holder(server, admin, "reader")
    with ollama.Client(host=server.url, headers=holder.headers, timeout=PATIENCE_S) as client:
        for refused in (lambda: client.pull("smollm2:135m"), lambda: client.delete("demo")):
            with pytest.raises(ollama.ResponseError, match="admin") as caught:
                refused()
            assert caught.value.status_code == 403


def test_what_was_told_is_in_the_ledger(server: Live, admin: Organization) -> None:
    holder = Holder(server, admin, "counted")
    told = [holder.generate().usage, list(holder.generate(stream=True, incremental_output=True))[-1].usage]
    tokens = sum(usage.total_tokens for usage in told)
    answer = holder.chat()
    tokens += answer.prompt_eval_count + answer.eval_count
    page = admin.usage.completions(start_time=int(time.time()) - 60, bucket_width="1d", project_ids=[holder.project.id])
    rows = [result for bucket in page.data for result in bucket.results]
    assert sum(row.input_tokens + row.output_tokens for row in rows) == tokens  # type: ignore[union-attr]
