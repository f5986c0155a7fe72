"""The access log and traces: what is written, and that no secret or prompt ever is."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from nimbos.telemetry import telemetry_wanted
from tests.live import OWNER_SECRET, serving, user

SCRIPT = {"replies": [], "default": {"text": "The answer is forty-two."}}
SECRET_PROMPT = "a prompt that nobody may read"
TRACE = "0af7651916cd43dd8448eb211c80319c"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """What structlog writes at level info while this is open."""
    before = structlog.get_config()
    written = io.StringIO()
    structlog.configure(
        processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(written),
        cache_logger_on_first_use=False,
    )
    try:
        yield written
    finally:
        structlog.configure(**before)


class Collector:
    """A real OTLP collector's HTTP side: keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, content)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, path: str, content: bytes) -> None:
        if path == "/v1/traces":
            traces = ExportTraceServiceRequest.FromString(content)
            self.spans += [span for r in traces.resource_spans for s in r.scope_spans for span in s.spans]
        else:
            metrics = ExportMetricsServiceRequest.FromString(content)
            self.metrics += [m for r in metrics.resource_metrics for s in r.scope_metrics for m in s.metrics]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    monkeypatch.setenv(ENDPOINT, made.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    yield made
    made.close()


def attributes_of(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_every_request_leaves_one_line_of_ids_counts_and_durations(tmp_path: Path) -> None:
    with logged() as written, serving(tmp_path, {"demo": SCRIPT}) as live:
        reply = live.chat(messages=user(SECRET_PROMPT))
        assert reply.status_code == 200
        live.http.get("/v1/models/no-such-model-of-mine")
        live.http.get("/no/such/route?key=abc")
        live.http.post("/v1/chat/completions", json={}, headers={"authorization": "Bearer nb-wrong-key"})
    text = written.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    requests = [line for line in lines if line["event"] == "http.request"]
    seen = [(line["route"], line["status"]) for line in requests]
    assert seen == [
        ("/v1/chat/completions", 200),
        ("/v1/models/{model:path}", 404),
        ("(none)", 404),
        ("/v1/chat/completions", 401),
    ]
    assert requests[0]["ask"] == reply.headers["x-nimbos-ask-id"]
    assert requests[0]["bytes"] == len(reply.content) and requests[0]["complete"] is True
    assert requests[0]["account"] and requests[3]["account"] is None
    for secret in (SECRET_PROMPT, "forty-two", OWNER_SECRET, "nb-wrong-key", "no-such-model-of-mine", "abc"):
        assert secret not in text, secret


def test_a_stream_whose_client_leaves_is_logged_as_not_complete(tmp_path: Path) -> None:
    slow = {"replies": [], "default": {"text": "word " * 2000, "tokens_per_second": 50}}
    with logged() as written, serving(tmp_path, {"demo": slow}) as live:
        body = {"model": "demo", "messages": user("hi"), "stream": True}
        with live.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    (request,) = [line for line in lines if line["event"] == "http.request"]
    assert request["status"] == 200 and request["complete"] is False


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({ENDPOINT: ""}, False),
        ({ENDPOINT: "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({ENDPOINT: "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_nothing_is_traced_unless_an_endpoint_is_set(environment: dict[str, str], wanted: bool) -> None:
    assert telemetry_wanted(environment) is wanted


def test_a_request_and_its_ask_are_spans_of_the_callers_trace(tmp_path: Path, collector: Collector) -> None:
    with serving(tmp_path, {"demo": SCRIPT}) as live:
        reply = live.http.post(
            "/v1/chat/completions",
            json={"model": "demo", "messages": user(SECRET_PROMPT), "max_tokens": 50, "temperature": 0.5},
            headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        )
        usage = reply.json()["usage"]
        failed = live.chat(model="missing")
        assert failed.status_code == 404
    spans = {span.name: span for span in collector.spans}
    ask, request = spans["chat demo"], spans["POST /v1/chat/completions"]
    assert ask.trace_id.hex() == TRACE
    assert ask.parent_span_id in {span.span_id for span in collector.spans if span.name == request.name}
    said = attributes_of(ask)
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert (said["gen_ai.request.model"], said["gen_ai.operation.name"]) == ("demo", "chat")
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.temperature"]) == (50, 0.5)
    statuses = sorted(
        attributes_of(span)["http.response.status_code"] for span in collector.spans if span.name == request.name
    )
    assert statuses == [200, 404]
    names = {metric.name for metric in collector.metrics}
    assert {"gen_ai.client.token.usage", "gen_ai.server.request.duration"} <= names
    tokens = next(metric for metric in collector.metrics if metric.name == "gen_ai.client.token.usage")
    assert sum(point.sum for point in tokens.histogram.data_points) == usage["total_tokens"]
    everything = b"".join(span.SerializeToString() for span in collector.spans)
    assert SECRET_PROMPT.encode() not in everything and OWNER_SECRET.encode() not in everything


def test_a_collector_that_is_gone_costs_no_request(tmp_path: Path, collector: Collector) -> None:
    collector.close()
    with serving(tmp_path, {"demo": SCRIPT}) as live:
        assert live.chat().status_code == 200
