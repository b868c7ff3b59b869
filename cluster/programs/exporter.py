"""Metrics for Prometheus: `core.metrics.Recorder` over the table of names, and their text."""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from ...core.metrics import METRICS, MODEL, VLLM, Metric

_Instrument = Counter | Gauge | Histogram
_Series = tuple[object, ...]
"""A metric's name and the labels of one of its series."""
TOGETHER = 128
"""Records that are added up in one go. A token's two, by themselves and with the caches full of what an engine computes with, took 50 µs;
put aside they take 30, and 14 more in a row with others (medians, busy machine). A go is a millisecond in which the router does nothing
else."""


class Exporter:
    """A `Recorder` with a registry of its own: several in one process do not meet. `model`: the label of vLLM's names.

    What has no worker's name among its labels is there from the start, at 0, so that a rate does not miss the first event. What is counted
    and observed is added up when there is much of it, or when somebody looks."""

    def __init__(self, model: str, metrics: tuple[Metric, ...] = METRICS) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter and histogram that nobody asked for
        self._registry = CollectorRegistry()
        self._model = model
        self._metrics = {metric.name: metric for metric in metrics}
        self._instruments = {metric.name: self._make(metric) for metric in metrics}
        self._known: dict[_Series, _Instrument] = {}
        """Finding a series costs four times as much as adding to it."""
        self._recorded: list[tuple[_Series, float]] = []
        """What is still to be added up."""
        for metric in metrics:
            if all(label.values for label in metric.labels):
                for values in product(*(label.values for label in metric.labels)):
                    self._at(metric.name, dict(zip(metric.label_names, values, strict=True)))

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._record(name, value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        cast(Gauge, self._at(name, labels)).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._record(name, value, labels)

    def forget(self, worker: str, phase: str) -> None:
        """Drop all series of a worker."""
        self._add_up()
        self._known.clear()
        for metric in self._metrics.values():
            if metric.of_worker:
                model = (self._model,) if metric.name.startswith(VLLM) else ()
                for rest in product(*(label.values for label in metric.labels[2:])):
                    with suppress(KeyError):  # not every worker has had every value, which releases before 0.21 do not take
                        self._instruments[metric.name].remove(*model, worker, phase, *rest)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        self._add_up()
        return generate_latest(self._registry)

    def _record(self, name: str, value: float, labels: dict[str, str]) -> None:
        key = (name, *labels.items())
        if key not in self._known:
            self._at(name, labels)
        self._recorded.append((key, value))
        if len(self._recorded) >= TOGETHER:
            self._add_up()

    def _add_up(self) -> None:
        recorded, self._recorded = self._recorded, []
        for key, value in recorded:
            instrument = self._known[key]
            if isinstance(instrument, Histogram):
                instrument.observe(value)
            else:
                cast(Counter, instrument).inc(value)

    def _make(self, metric: Metric) -> _Instrument:
        names = (MODEL, *metric.label_names) if metric.name.startswith(VLLM) else metric.label_names
        match metric.kind:
            case "counter":
                return Counter(metric.name, metric.help, names, registry=self._registry)
            case "gauge":
                return Gauge(metric.name, metric.help, names, registry=self._registry)
            case "histogram":
                return Histogram(metric.name, metric.help, names, registry=self._registry, buckets=metric.buckets)

    def _at(self, name: str, labels: dict[str, str]) -> _Instrument:
        key = (name, *labels.items())
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._find(name, labels)
        return known

    def _find(self, name: str, labels: dict[str, str]) -> _Instrument:
        metric = self._metrics[name]
        if labels.keys() != set(metric.label_names):
            raise KeyError(f"{name} has labels {metric.label_names}, not {tuple(labels)}")
        for label in metric.labels:
            if label.values and labels[label.name] not in label.values:
                raise KeyError(f"{name} has no {label.name} {labels[label.name]!r}")
        if name.startswith(VLLM):
            labels = {MODEL: self._model, **labels}
        instrument = self._instruments[name]
        return instrument.labels(**labels) if labels else instrument
