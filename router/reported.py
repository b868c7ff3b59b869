"""What a worker reports of itself, as metrics."""

from __future__ import annotations

from ..core.fleet import Measure, Member, WorkerReport
from ..core.metrics import METRICS, Recorder

_OF_WORKER = {metric.name: metric for metric in METRICS if metric.of_worker}


class Reported:
    """Records when somebody looks, not with every report: of these a worker sends four a second and more, each 0.1 ms to record."""

    def __init__(self, member: Member, recorder: Recorder) -> None:
        self._member = member
        self._recorder = recorder
        self._counted: dict[tuple[str, str], float] = {}

    def show(self, report: WorkerReport | None) -> None:
        """The latest; None while the worker is not known to live: what it said last stands."""
        self._set("diptych_worker_up", float(report is not None))
        if report is None:
            return
        self._set("vllm:num_requests_running", report.running)
        self._set("vllm:num_requests_waiting", report.waiting)
        self._set("diptych_worker_leases", report.leases)
        self._set("vllm:kv_cache_usage_perc", 1.0 - report.blocks_free / max(1, report.blocks_total))
        for name, total in report.counters:
            self._record(Measure(name, total))
        for measure in report.measures:
            self._record(measure)

    def _record(self, measure: Measure) -> None:
        """A newer worker may measure what this router has no name for."""
        metric = _OF_WORKER.get(measure.name)
        if metric is None or any(measure.label not in label.values for label in metric.labels[2:]):
            return
        if metric.kind == "gauge":
            self._set(measure.name, measure.value, measure.label)
            return
        key = (measure.name, measure.label)
        if (more := measure.value - self._counted.get(key, 0.0)) > 0:
            self._counted[key] = measure.value
            self._recorder.inc(measure.name, more, **self._labels(measure.name, measure.label))

    def _set(self, name: str, value: float, label: str = "") -> None:
        self._recorder.set(name, value, **self._labels(name, label))

    def _labels(self, name: str, label: str) -> dict[str, str]:
        who: tuple[str, ...] = (self._member.worker_id, self._member.phase.value, label)
        return dict(zip(_OF_WORKER[name].label_names, who, strict=False))
