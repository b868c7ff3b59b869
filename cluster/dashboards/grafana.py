"""A Grafana dashboard: the few numbers one looks at first, then a panel for every metric of the table, in rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.metrics import METRICS, VLLM, Metric

COLUMNS = 24
"""Width of Grafana's grid."""
SOURCE = {"type": "prometheus", "uid": "${source}"}
WHERE = 'job=~"$job"'
RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """`targets`: expression and legend. `kind`: Grafana's. `ratio`: its values lie between 0 and 1."""

    title: str
    help: str
    targets: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 7


def _stat(title: str, help: str, expr: str, unit: str = "short") -> Panel:
    return Panel(title, help, ((expr, ""),), unit, kind="stat", width=3, height=4)


def _p90(name: str) -> str:
    return f"histogram_quantile(0.9, sum by (le) (rate({name}_bucket{{{WHERE}}}[{RATE}])))"


FIRST: tuple[Panel, ...] = (
    _stat("Workers up", "Workers whose report is fresh.", f"sum(diptych_worker_up{{{WHERE}}})"),
    _stat("Running", "Requests accepted and not yet ended.", f"sum(diptych_requests_running{{{WHERE}}})"),
    _stat("Prompts waiting", "Attempts queued at prefill workers.", f'sum(vllm:num_requests_waiting{{{WHERE},phase="prefill"}})'),
    _stat("TTFT p90", "Time to the first token.", _p90("vllm:time_to_first_token_seconds"), "s"),
    _stat("TPOT p90", "Time per output token.", _p90("vllm:request_time_per_output_token_seconds"), "s"),
    _stat("Tokens", "Tokens a second to clients.", f"sum(rate(vllm:generation_tokens_total{{{WHERE}}}[{RATE}]))"),
    _stat("KV moved", "KV handed over.", f"sum(rate(diptych_kv_transfer_bytes_total{{{WHERE}}}[{RATE}]))", "Bps"),
    _stat("Fullest pool", "The largest share of a KV pool in use.", f"max(vllm:kv_cache_usage_perc{{{WHERE}}})", "percentunit"),
)


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    vllm = [metric for metric in METRICS if metric.name.startswith(VLLM) and not metric.of_worker]
    workers = [metric for metric in METRICS if metric.of_worker]
    router = [metric for metric in METRICS if metric not in vllm and metric not in workers]
    rows = (
        ("Now", FIRST),
        ("Tokens and latency", [_panel(metric) for metric in vllm]),
        ("Requests and hand-over", [_panel(metric) for metric in router]),
        ("Workers", [_panel(metric) for metric in workers]),
    )
    return {
        "title": "Diptych",
        "uid": "diptych",
        "tags": ["diptych", "llm"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _jobs()]},
        "panels": list(_placed(rows)),
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _jobs() -> dict[str, Any]:
    return {
        "name": "job",
        "label": "Cluster (job)",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(diptych_requests_running, job)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(metric: Metric) -> Panel:
    """What a metric's kind asks for: a rate, a value, or the quantiles of a distribution."""
    by = metric.label_names
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    title = metric.name.removeprefix(VLLM).removeprefix("diptych_")
    if metric.kind == "histogram":
        group = ", ".join(("le", *by))
        quantiles = tuple(
            (f"histogram_quantile({q}, sum by ({group}) (rate({metric.name}_bucket{{{WHERE}}}[{RATE}])))", f"p{q * 100:g} {legend}".strip())
            for q in (0.5, 0.9, 0.99)
        )
        return Panel(title, metric.help, quantiles, "s")
    value = f"{metric.name}{{{WHERE}}}"
    over = f"sum by ({', '.join(by)})" if by else "sum"
    if metric.kind == "gauge":
        return Panel(
            title, metric.help, ((f"{over} ({value})", legend or title),), "percentunit" if metric.name.endswith("_perc") else "short"
        )
    unit = "Bps" if "bytes" in metric.name else "cps"
    return Panel(f"{title.removesuffix('_total')} a second", metric.help, ((f"{over} (rate({value}[{RATE}]))", legend or title),), unit)


def _placed(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Iterator[dict[str, Any]]:
    """The panels with their places: each row's from left to right, then down."""
    number, y = 1, 0
    for title, panels in rows:
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, y, COLUMNS, 1)}
        number, y, x = number + 1, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + panel.height
            yield _drawn(panel, number, _place(x, y, panel.width, panel.height))
            number, x = number + 1, x + panel.width
        y += panels[-1].height


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend or "__auto"}
        for index, (expr, legend) in enumerate(panel.targets)
    ]
    bounds: dict[str, Any] = {"min": 0, "max": 1} if panel.unit == "percentunit" else {"min": 0}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, **bounds}, "overrides": []},
        "targets": targets,
    }
