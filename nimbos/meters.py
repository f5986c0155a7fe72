"""The service's own numbers for Prometheus: asks and tokens by model and class. Engines bring theirs when asked.
Read `api/metrics.py` for how both become one page."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nimbos.types import Account, Ask, Origin, Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Meters:
    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        by = ("model", "ask_class")
        self._running = Gauge("nimbos_asks_running", "Asks that are being answered.", by, registry=self.registry)
        self._asks = Counter("nimbos_asks_total", "Asks that ended, by how.", (*by, "outcome"), registry=self.registry)
        self._tokens = Counter("nimbos_tokens_total", "Tokens, by meter.", (*by, "meter"), registry=self.registry)
        self._first_token = Histogram(
            "nimbos_time_to_first_token_seconds",
            "From admission to the first chunk.",
            by,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._duration = Histogram(
            "nimbos_ask_seconds", "From admission to the end.", by, buckets=_SECONDS, registry=self.registry
        )
        self._series: dict[tuple[str, str], _Series] = {}
        self._alerts = Counter(
            "nimbos_budget_alerts_total", "Thresholds of budgets that were reached.", ("meter",), registry=self.registry
        )

    def alert(self, meter: str) -> None:
        """A budget of this meter reached a threshold."""
        self._alerts.labels(meter).inc()

    def begin(self, ask: Ask, account: Account, origin: Origin) -> None:
        self._of(ask).running.inc()

    def first_token(self, ask: Ask, seconds: float) -> None:
        self._of(ask).first_token.observe(seconds)

    def settle(self, ask: Ask, *, usage: Usage, outcome: str, seconds: float) -> None:
        by = (ask.model, ask.ask_class.value)
        series = self._of(ask)
        series.running.dec()
        series.duration.observe(seconds)
        self._asks.labels(*by, outcome).inc()
        for meter in usage.__struct_fields__:
            count = getattr(usage, meter)
            if count:
                self._tokens.labels(*by, meter).inc(count)

    def _of(self, ask: Ask) -> _Series:
        """Looking a series up by its labels costs more than counting in it."""
        by = (ask.model, ask.ask_class.value)
        found = self._series.get(by)
        if found is None:
            found = self._series[by] = _Series(
                running=self._running.labels(*by),
                first_token=self._first_token.labels(*by),
                duration=self._duration.labels(*by),
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """Of one model and class."""

    running: Gauge
    first_token: Histogram
    duration: Histogram
