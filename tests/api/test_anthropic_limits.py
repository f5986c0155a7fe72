"""Limits, budgets and scopes as Anthropic's client is told of them; and what it is told is in the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import anthropic
import openai
import pytest
from openai.resources.admin.organization import Organization

from tests.conftest import DEMO
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO, "other": DEMO}) as running:
        yield running


@pytest.fixture(scope="module")
def admin(server: Live) -> Iterator[Organization]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="-", admin_api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client.admin.organization


class Holder:
    """A project with one key, and the client with it."""

    def __init__(self, server: Live, admin: Organization, name: str) -> None:
        self.project = admin.projects.create(name=name)
        made = admin.projects.service_accounts.create(self.project.id, name=name).api_key
        assert made is not None
        self.client = anthropic.Anthropic(base_url=server.url, api_key=made.value, max_retries=0, timeout=PATIENCE_S)

    def ask(self, text: str = "hi", **fields: Any) -> anthropic.types.Message:
        given = {"model": "demo", "max_tokens": 100, "messages": user(text)}
        return self.client.messages.create(**{**given, **fields})


@pytest.fixture
def holder(server: Live, admin: Organization, request: pytest.FixtureRequest) -> Iterator[Holder]:
    made = Holder(server, admin, request.node.name[:40])
    with made.client:
        yield made


def test_a_limit_of_requests_is_told_before_and_when_it_is_reached(admin: Organization, holder: Holder) -> None:
    admin.projects.rate_limits.update_rate_limit("rl-demo", project_id=holder.project.id, max_requests_per_1_minute=2)
    raw = holder.client.messages.with_raw_response.create(model="demo", max_tokens=5, messages=user("hi"))  # type: ignore[arg-type]
    assert raw.headers["anthropic-ratelimit-requests-limit"] == "2"
    assert raw.headers["anthropic-ratelimit-requests-remaining"] == "1"
    assert datetime.fromisoformat(raw.headers["anthropic-ratelimit-requests-reset"]) > datetime(2020, 1, 1, tzinfo=UTC)
    holder.ask()
    for stream in (False, True):
        with pytest.raises(anthropic.RateLimitError, match="requests") as caught:
            holder.ask(stream=stream)
        assert caught.value.type == "rate_limit_error"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.response.headers["anthropic-ratelimit-requests-remaining"] == "0"
    counted = holder.client.messages.count_tokens(model="demo", messages=user("hi"))  # type: ignore[arg-type]
    assert counted.input_tokens == 1  # counting costs nothing


def test_a_budget_ends_an_answer_and_then_refuses(server: Live, holder: Holder) -> None:
    budget = {"owner_kind": "project", "owner_id": holder.project.id, "meter": "tokens", "limit": 4, "period": "total"}
    assert server.post("/v1/organization/budgets", budget).status_code == 200
    first = holder.ask()
    assert (first.stop_reason, first.usage.input_tokens + first.usage.output_tokens) == ("max_tokens", 4)
    assert (first.model_extra or {})["x_nimbos"]["stop"] == "budget"
    with pytest.raises(anthropic.RateLimitError, match="budget") as caught:
        holder.ask()
    assert (caught.value.type, caught.value.error_code) == ("billing_error", "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_model_that_a_key_may_not_ask_is_not_answered(admin: Organization, holder: Holder) -> None:
    admin.projects.model_permissions.update(holder.project.id, mode="allow_list", model_ids=["other"])
    with pytest.raises(anthropic.PermissionDeniedError, match="demo") as caught:
        holder.ask()
    assert caught.value.type == "permission_error"
    with pytest.raises(anthropic.PermissionDeniedError, match="demo"):
        holder.client.messages.count_tokens(model="demo", messages=user("hi"))  # type: ignore[arg-type]
    assert [model.id for model in holder.client.models.list()] == ["other"]
    with pytest.raises(anthropic.NotFoundError):
        holder.client.models.retrieve("demo")


def test_what_was_told_is_in_the_ledger(admin: Organization, holder: Holder) -> None:
    whole = holder.ask("think", thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000).usage
    with holder.client.messages.stream(model="demo", max_tokens=50, messages=user("count")) as stream:  # type: ignore[arg-type]
        streamed = stream.get_final_message().usage
    page = admin.usage.completions(start_time=int(time.time()) - 60, bucket_width="1d", project_ids=[holder.project.id])
    rows: Any = [result for bucket in page.data for result in bucket.results]
    assert sum(row.num_model_requests for row in rows) == 2
    assert sum(row.input_tokens for row in rows) == whole.input_tokens + streamed.input_tokens
    assert sum(row.output_tokens for row in rows) == whole.output_tokens + streamed.output_tokens


def test_a_batch_is_charged_like_the_messages_it_holds(admin: Organization, holder: Holder) -> None:
    params: Any = {"model": "demo", "max_tokens": 50, "messages": user("count")}
    batch = holder.client.messages.batches.create(requests=[{"custom_id": str(n), "params": params} for n in range(3)])
    for _ in range(2_000):
        if holder.client.messages.batches.retrieve(batch.id).processing_status == "ended":
            break
    told: Any = [line.result for line in holder.client.messages.batches.results(batch.id)]
    tokens = sum(result.message.usage.input_tokens + result.message.usage.output_tokens for result in told)
    page = admin.usage.completions(start_time=int(time.time()) - 60, bucket_width="1d", project_ids=[holder.project.id])
    rows: Any = [result for bucket in page.data for result in bucket.results]
    assert sum(row.input_tokens + row.output_tokens for row in rows) == tokens > 0
    assert sum(row.num_model_requests for row in rows) == 3
