"""Metrics for Prometheus: `core.metrics.Recorder` over the table of names, and their text."""

from __future__ import annotations

from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from ..core.metrics import METRICS, Metric

_Instrument = Counter | Gauge | Histogram


class Exporter:
    """A `Recorder` with a registry of its own: several in one process do not meet."""

    def __init__(self, metrics: tuple[Metric, ...] = METRICS) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter and histogram that nobody asked for
        self._registry = CollectorRegistry()
        self._metrics = {metric.name: metric for metric in metrics}
        self._instruments = {metric.name: self._make(metric) for metric in metrics}

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        cast(Counter, self._at(name, labels)).inc(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        cast(Gauge, self._at(name, labels)).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        cast(Histogram, self._at(name, labels)).observe(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _make(self, metric: Metric) -> _Instrument:
        match metric.kind:
            case "counter":
                return Counter(metric.name, metric.help, metric.labels, registry=self._registry)
            case "gauge":
                return Gauge(metric.name, metric.help, metric.labels, registry=self._registry)
            case "histogram":
                return Histogram(metric.name, metric.help, metric.labels, registry=self._registry, buckets=metric.buckets)

    def _at(self, name: str, labels: dict[str, str]) -> _Instrument:
        metric = self._metrics[name]
        if labels.keys() != set(metric.labels):
            raise KeyError(f"{name} has labels {metric.labels}, not {tuple(labels)}")
        instrument = self._instruments[name]
        return instrument.labels(**labels) if labels else instrument
