"""Models, health, metrics, and what every route does with a wrong path."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.live import Live, error_of, serving, user


def test_models_are_listed_in_the_official_shape(live: Live) -> None:
    models = list(live.client.models.list())
    assert [(model.id, model.object, model.owned_by) for model in models] == [("demo", "model", "scripted")]
    assert live.client.models.retrieve("demo").id == "demo"


def test_a_model_that_is_not_there_is_a_404(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="demo"):
        live.client.models.retrieve("owner/other")


def test_scripted_models_are_named_after_their_files_in_the_given_order(tmp_path: Path) -> None:
    scripts = {name: {"default": {"text": name}} for name in ("zebra", "ant")}
    with serving(tmp_path / "home", scripts) as live:
        assert [model.id for model in live.client.models.list()] == ["zebra", "ant"]
        for name in scripts:
            reply = live.client.chat.completions.create(model=name, messages=user("who?"))
            assert reply.choices[0].message.content == name


def test_health_is_503_while_no_model_is_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as live:
        response = live.http.get("/health")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert live.http.get("/v1/models").json()["data"] == []


def test_metrics_count_asks_and_tokens_by_model_and_class(tmp_path: Path) -> None:
    with serving(tmp_path / "home", {"demo": {"default": {"text": "one two three", "thinking": "hm"}}}) as live:
        live.chat(service_tier="flex").raise_for_status()
        samples = {
            (sample.name, sample.labels.get("meter"), sample.labels.get("outcome")): sample.value
            for family in text_string_to_metric_families(live.http.get("/metrics").text)
            for sample in family.samples
            if sample.labels.get("model") == "demo" and sample.labels.get("ask_class") == "batch"
        }
    assert samples["nimbos_asks_total", None, "done"] == 1
    assert samples["nimbos_tokens_total", "input", None] == 1
    assert samples["nimbos_tokens_total", "output", None] == 4
    assert samples["nimbos_tokens_total", "thinking", None] == 1
    assert samples["nimbos_asks_running", None, None] == 0


def test_a_wrong_route_or_method_is_an_error_in_our_shape(live: Live) -> None:
    assert "/v1/chat" in error_of(live.http.get("/v1/chat"), 404)["message"]
    response = live.http.get("/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
