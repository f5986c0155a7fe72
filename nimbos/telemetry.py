"""OpenTelemetry: one span for each request and each ask, and the token metrics, by the GenAI conventions.

Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or its `…_TRACES_…`/`…_METRICS_…` form) is set; then the extra `nimbos[otel]`
must be installed. Ids, counts and durations only: no prompt, no answer, no key.
Source: the semantic conventions for generative AI (gen_ai.*), status "development"; this is the only file that knows
their names. Read `service.py` for when an ask begins, speaks and ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nimbos import __version__
from nimbos.errors import ConfigError
from nimbos.types import Account, Ask, Kind, Origin, Usage

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

_ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
_PROVIDER = "nimbos"
_OPERATIONS = {Kind.GENERATE: "chat", Kind.EMBED: "embeddings", Kind.RERANK: "rerank"}
_TOKEN_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)  # powers of 4, as the conventions advise
_SECOND_BOUNDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


@dataclass(slots=True, eq=False)
class _Running:
    span: Span
    started: float
    first_token_s: float | None = None


class Telemetry:
    """Watches asks; `close` sends what is left."""

    def __init__(self, traces: TracerProvider, meters: MeterProvider) -> None:
        self._traces = traces
        self._meters = meters
        self._tracer: Tracer = traces.get_tracer("nimbos", __version__)
        meter = meters.get_meter("nimbos", __version__)

        def histogram(name: str, unit: str, what: str, bounds: tuple[float, ...]) -> Histogram:
            return meter.create_histogram(name, unit=unit, description=what, explicit_bucket_boundaries_advisory=bounds)

        self._tokens = histogram("gen_ai.client.token.usage", "{token}", "Tokens of an ask.", _TOKEN_BOUNDS)
        self._duration = histogram("gen_ai.server.request.duration", "s", "An ask's whole time.", _SECOND_BOUNDS)
        self._first = histogram(
            "gen_ai.server.time_to_first_token", "s", "From admission to the first token.", _SECOND_BOUNDS
        )
        self._each = histogram(
            "gen_ai.server.time_per_output_token", "s", "Time for each token after the first.", _SECOND_BOUNDS
        )
        self._running: dict[str, _Running] = {}

    @property
    def tracer(self) -> Tracer:
        return self._tracer

    def begin(self, ask: Ask, account: Account, origin: Origin) -> None:
        """The ask's span is a child of the request's, where there is one."""
        sampling = ask.sampling
        attributes: dict[str, str | int | float] = {
            **_who(ask),
            "gen_ai.request.choice.count": ask.n,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.id": ask.id,
            "nimbos.account.id": account.id,
            "nimbos.key.id": account.key,
            "nimbos.class": ask.ask_class.value,
            "nimbos.route": origin.route,
        }
        if ask.limit_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = ask.limit_tokens
        if sampling.top_k:
            attributes["gen_ai.request.top_k"] = sampling.top_k
        if origin.process:
            attributes["nimbos.process.id"] = origin.process
        if origin.batch:
            attributes["nimbos.batch.id"] = origin.batch
        span = self._tracer.start_span(f"{_OPERATIONS[ask.kind]} {ask.model}", attributes=attributes)
        self._running[ask.id] = _Running(span, time.monotonic())

    def first_token(self, ask: Ask, seconds: float) -> None:
        running = self._running.get(ask.id)
        if running is not None:
            running.first_token_s = seconds
            running.span.add_event("first_token")
            self._first.record(seconds, _who(ask))

    def settle(self, ask: Ask, *, usage: Usage, outcome: str, seconds: float) -> None:
        """`outcome`: "done", "cancelled" or the error's code."""
        running = self._running.pop(ask.id, None)
        if running is None:
            return
        from opentelemetry.trace import Status, StatusCode

        who = _who(ask)
        failed = outcome not in ("done", "cancelled")
        span = running.span
        span.set_attribute("gen_ai.usage.input_tokens", usage.input)
        span.set_attribute("gen_ai.usage.output_tokens", usage.output)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached)
        span.set_attribute("gen_ai.usage.reasoning.output_tokens", usage.thinking)
        span.set_attribute("nimbos.outcome", outcome)
        if failed:
            span.set_attribute("error.type", outcome)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
        self._tokens.record(usage.input, {**who, "gen_ai.token.type": "input"})
        if ask.kind is Kind.GENERATE:
            self._tokens.record(usage.output, {**who, "gen_ai.token.type": "output"})
        self._duration.record(seconds, {**who, "error.type": outcome} if failed else who)
        if running.first_token_s is not None and usage.output > 1:
            self._each.record((seconds - running.first_token_s) / (usage.output - 1), who)

    def close(self) -> None:
        """Sends what is left. It waits for the collector, so it runs in a thread."""
        for provider in (self._traces, self._meters):
            shutdown = getattr(provider, "shutdown", None)
            if shutdown is not None:
                shutdown()


def telemetry_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not off and any(environment.get(name) for name in _ENDPOINTS)


def open_telemetry(server_id: str) -> Telemetry | None:
    """None unless an endpoint is set.

    Raises: ConfigError when one is and the exporter is not installed.
    """
    if not telemetry_wanted():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and the exporter is not installed: pip install 'nimbos[otel]'."
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "nimbos")
    resource = Resource.create({"service.name": name, "service.version": __version__, "service.instance.id": server_id})
    traces = TracerProvider(resource=resource)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    meters = MeterProvider(resource=resource, metric_readers=[PeriodicExportingMetricReader(OTLPMetricExporter())])
    return Telemetry(traces, meters)


def _who(ask: Ask) -> dict[str, str | int | float]:
    return {
        "gen_ai.operation.name": _OPERATIONS[ask.kind],
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": ask.model,
        "gen_ai.response.model": ask.model,
    }
