"""The page of metrics, made from their table: `python -m diptych.cluster.metrics_docs [--check] docs/metrics.md`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..core.metrics import METRICS, MODEL, VLLM, Metric
from .dashboards.alerts import ALERTS
from .dashboards.made import make

INTRO = f"""# Metrics

The router answers `GET /metrics` on its HTTP port with everything below, in Prometheus' text format: what it counts itself, and what its
workers report to it at least once a second. Workers open no port for it. What vLLM has a name for is called that, with the same label
`{MODEL}`, so that dashboards and autoscalers made for vLLM work; an engine there is a worker here. The rest begins with `diptych_`.

Every label has few values, those listed here or the names of the fleet's workers, so the number of series is bounded; when a worker
leaves, its series go. A histogram has `_bucket`, `_sum` and `_count`, with bounds from 1 ms (transfers: 0.1 ms) to 60 s.

Local prefills are `diptych_attempts_total{{path="local"}}`. The KV bytes of all transports are the sum of what clients
are told in their timing. Refusals are counted over HTTP and gRPC alike, but for a message that gRPC itself refuses as too long: the router
never sees it.

Made from the same table, in `cluster/dashboards/`: a Grafana dashboard (`grafana.json`, import it and choose the data source) and
Prometheus alert rules (`alerts.yaml`), each with a test that it fires (`alerts_test.yaml`, for `promtool test rules`).

<!-- Made by `python -m diptych.cluster.metrics_docs docs/metrics.md` from core/metrics.py and
cluster/dashboards/alerts.py; change it there. -->
"""


def reference() -> str:
    """docs/metrics.md, whole."""
    vllm = [metric for metric in METRICS if metric.name.startswith(VLLM)]
    workers = [metric for metric in METRICS if metric not in vllm and metric.of_worker]
    router = [metric for metric in METRICS if metric not in vllm and metric not in workers]
    parts = (("Names that vLLM has", vllm), ("Requests and transfers", router), ("Workers", workers))
    return INTRO + "\n".join([*(line for title, metrics in parts for line in _table(title, metrics)), *_alerts()]) + "\n"


def _alerts() -> Iterator[str]:
    yield from ("\n## Alerts\n", "| alert | severity | after | when |", "| --- | --- | --- | --- |")
    for alert in ALERTS:
        summary = re.sub(r"{{ \$labels\.(\w+) }}", r"(\1)", alert.summary)
        yield f"| {alert.name} | {alert.severity} | {alert.held} | {summary} |"


def _table(title: str, metrics: list[Metric]) -> Iterator[str]:
    yield from (f"\n## {title}\n", "| name | type | labels | meaning |", "| --- | --- | --- | --- |")
    for metric in metrics:
        yield f"| `{metric.name}` | {metric.kind} | {_labels(metric) or '–'} | {metric.help} |"


def _labels(metric: Metric) -> str:
    """Each label with its values; those of workers speak for themselves."""
    names = [f"`{MODEL}`"] if metric.name.startswith(VLLM) else []
    for label in metric.labels:
        values = "" if not label.values or label.name == "phase" else f" ({', '.join(label.values)})"
        names.append(f"`{label.name}`{values}")
    return ", ".join(names)


def main() -> int:
    *flags, name = sys.argv[1:]
    return make({Path(name): reference()}, f"python -m diptych.cluster.metrics_docs {name}", flags)


if __name__ == "__main__":
    sys.exit(main())
