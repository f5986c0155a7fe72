"""`GET /metrics` for Prometheus: the service's own numbers, and each engine's as of that moment."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from nimbos.engine import STEP_BUCKETS_S, EngineStats
from nimbos.meters import Meters
from nimbos.service import Service

_COUNTERS = {
    "nimbos_engine_restarts": ("restarts", "Times this model's engine process was started again."),
    "nimbos_engine_steps": ("steps", "Forward passes."),
    "nimbos_engine_step_rows": ("step_rows", "Rows (tokens) of all forward passes."),
    "nimbos_engine_prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted asks."),
    "nimbos_engine_cached_tokens": ("cached_tokens", "Prompt tokens that were in memory already."),
    "nimbos_engine_computed_tokens": ("computed_tokens", "Tokens computed."),
    "nimbos_engine_recomputed_tokens": ("recomputed_tokens", "Tokens computed again after an engine's death."),
    "nimbos_engine_preemptions": ("preemptions", "Prefills that gave way to interactive asks."),
    "nimbos_engine_stalls": ("stalls", "Steps with an interactive row that took longer than the stall target."),
    "nimbos_engine_evictions": ("evictions", "Cached branches that were forgotten to make room."),
    "nimbos_engine_guessed_tokens": ("guessed_tokens", "Tokens computed ahead because the text repeats itself."),
    "nimbos_engine_guessed_right_tokens": ("guessed_right_tokens", "Guessed tokens that came true."),
    "nimbos_engine_swapped_out_tokens": ("swapped_out_tokens", "Tokens of idle contexts that were written out."),
    "nimbos_engine_swapped_in_tokens": ("swapped_in_tokens", "Tokens that were put back instead of computed again."),
    "nimbos_engine_overhead_seconds": ("overhead_seconds_sum", "Time in steps outside the forward pass."),
}
_GAUGES = {
    "nimbos_engine_cells_used": ("cells_used", "Cells of KV memory in use."),
    "nimbos_engine_cells_pinned": ("cells_pinned", "Cells of prefixes that an ask has pinned."),
    "nimbos_engine_swapped_bytes": ("swapped_bytes", "Memory of contexts that were written out."),
    "nimbos_engine_cells": ("cells_total", "Cells of KV memory there are."),
    "nimbos_engine_sequences_used": ("sequences_used", "Sequence ids in use."),
    "nimbos_engine_resident_bytes": ("resident_bytes", "Memory of the engine process."),
}


class Metrics:
    def __init__(self, service: Service, meters: Meters) -> None:
        self._service = service
        self._meters = meters

    async def get(self, _: Request) -> Response:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(await self._service.stats()))
        content = generate_latest(self._meters.registry) + generate_latest(registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})


class _Snapshot(Collector):
    def __init__(self, stats: dict[str, EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        for name, (field, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=("model",))
            for model, stats in self._stats.items():
                counter.add_metric((model,), getattr(stats, field))
            yield counter
        for name, (field, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=("model",))
            for model, stats in self._stats.items():
                gauge.add_metric((model,), getattr(stats, field))
            yield gauge
        yield self._hit_rate()
        yield from self._by_class()
        yield self._step_seconds()

    def _hit_rate(self) -> Metric:
        gauge = GaugeMetricFamily(
            "nimbos_engine_prefix_hit_ratio", "Part of all prompt tokens that was in memory.", labels=("model",)
        )
        for model, stats in self._stats.items():
            gauge.add_metric((model,), stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0)
        return gauge

    def _by_class(self) -> Iterable[Metric]:
        labels = ("model", "ask_class")
        waiting = GaugeMetricFamily("nimbos_engine_queue", "Asks that wait for their first step.", labels=labels)
        live = GaugeMetricFamily("nimbos_engine_live", "Branches in the engine.", labels=labels)
        output = CounterMetricFamily("nimbos_engine_output_tokens", "Tokens of answers.", labels=labels)
        for model, stats in self._stats.items():
            for family, counts in ((waiting, stats.waiting), (live, stats.live), (output, stats.output_tokens)):
                for ask_class, count in counts.items():
                    family.add_metric((model, ask_class.value), count)
        return waiting, live, output

    def _step_seconds(self) -> Metric:
        histogram = HistogramMetricFamily("nimbos_engine_step_seconds", "Length of forward passes.", labels=("model",))
        for model, stats in self._stats.items():
            counts = accumulate(stats.step_seconds or (0,) * len(STEP_BUCKETS_S))
            bounds = [*(str(bound) for bound in STEP_BUCKETS_S[:-1]), "+Inf"]
            buckets = [(bound, float(count)) for bound, count in zip(bounds, counts, strict=True)]
            histogram.add_metric((model,), buckets, sum_value=stats.step_seconds_sum)
        return histogram
