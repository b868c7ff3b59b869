"""Prometheus alert rules, and for each a test for promtool: a history at which it fires, and one at which it does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RATE = "5m"
"""Over what rates are taken: five scrapes of a minute, or twenty of 15 s."""
JOB = 'job="diptych"'
"""The label by which the tests' series say where they come from, as a scrape does."""


@dataclass(frozen=True, slots=True)
class Alert:
    """`held`: how long `expr` must hold. `fires` and `quiet`: series → values by minute, in promtool's notation. `labels`: those of the
    alert that `fires` gives, beside its severity; `{{ $labels.x }}` in the texts stands for them."""

    name: str
    severity: str
    held: str
    expr: str
    summary: str
    mend: str
    fires: dict[str, str]
    quiet: dict[str, str]
    labels: dict[str, str] = field(default_factory=lambda: {"job": "diptych"})


def _rate(name: str, where: str = "") -> str:
    return f"sum by (job) (rate({name}{where}[{RATE}]))"


def _p90(name: str) -> str:
    return f"histogram_quantile(0.9, sum by (job, le) (rate({name}_bucket[{RATE}])))"


def _buckets(name: str, below: str, above: str, slow: bool) -> dict[str, str]:
    """A history in which all observations, ten a minute, lie above `below` if `slow`, else below it."""
    fast, every = "0+0x30" if slow else "0+10x30", "0+10x30"
    return {f'{name}_bucket{{{JOB},le="{le}"}}': values for le, values in ((below, fast), (above, every), ("+Inf", every))}


_BAD = '{outcome=~"internal|unavailable|transfer_failed|deadline_exceeded"}'
_APART = '{path="disaggregated"}'
_ATTEMPTS = f'diptych_attempts_total{{{JOB},path="disaggregated"}}'
_RETRIES = f'diptych_retries_total{{code="transfer_failed",{JOB}}}'
_BYTES = f'diptych_kv_transfer_bytes_total{{{JOB},transport="shm"}}'
_DECODE = f'engine="decode-0",{JOB},phase="decode"'
_WORKER = f'{JOB},phase="decode",worker="decode-0"'

ALERTS: tuple[Alert, ...] = (
    Alert(
        "DiptychRouterGone", "critical", "2m", "absent(diptych_requests_running)",
        "No router is scraped.",
        "See whether it runs (diptych status, or its pod) and whether Prometheus reaches its HTTP port.",
        {f"other{{{JOB}}}": "1x30"}, {f"diptych_requests_running{{{JOB}}}": "0x30"}, labels={},
    ),
    Alert(
        "DiptychNoDecodeWorker", "critical", "1m", 'sum by (job) (diptych_worker_up{phase="decode"}) == 0',
        "No decode worker lives: no request is answered.",
        "The supervisor starts a dead worker again; its log says why it ended. diptych scale brings more.",
        {f"diptych_worker_up{{{_WORKER}}}": "0x30"},
        {f"diptych_worker_up{{{_WORKER}}}": "0x30", f'diptych_worker_up{{{JOB},phase="decode",worker="decode-1"}}': "1x30"},
    ),
    Alert(
        "DiptychWorkerGone", "warning", "2m", "diptych_worker_up == 0",
        "Worker {{ $labels.worker }} has not reported for two minutes.",
        "See its log; the supervisor gives up on a worker that died too often, and diptych scale replaces it.",
        {f"diptych_worker_up{{{_WORKER}}}": "0x30"}, {f"diptych_worker_up{{{_WORKER}}}": "1x30"},
        labels={"job": "diptych", "phase": "decode", "worker": "decode-0"},
    ),
    Alert(
        "DiptychRequestsFail", "critical", "5m",
        f"{_rate('diptych_requests_total', _BAD)} / {_rate('diptych_requests_total')} > 0.05",
        "More than one request in twenty fails.",
        "The outcome label says how; the router's log has a line for each request, with its id and its error.",
        {f'diptych_requests_total{{{JOB},outcome="unavailable"}}': "0+1x30", f'diptych_requests_total{{{JOB},outcome="stop"}}': "0+9x30"},
        {f'diptych_requests_total{{{JOB},outcome="unavailable"}}': "0x30", f'diptych_requests_total{{{JOB},outcome="stop"}}': "0+9x30"},
    ),
    Alert(
        "DiptychOverloaded", "warning", "5m", _rate("diptych_refusals_total", '{reason="overloaded"}') + " > 0",
        "Requests are refused because too many run.",
        "Add workers (diptych scale), or raise router.limits.running if latency still allows it.",
        {f'diptych_refusals_total{{{JOB},reason="overloaded"}}': "0+5x30"},
        {f'diptych_refusals_total{{{JOB},reason="invalid_request"}}': "0+5x30"},
    ),
    Alert(
        "DiptychRequestsHeld", "warning", "5m", _rate("diptych_requests_held_total") + " > 0",
        "Requests wait at the router because no worker can take them.",
        "Workers are missing or still starting: see diptych_worker_up and the logs of the workers.",
        {f"diptych_requests_held_total{{{JOB}}}": "0+2x30"}, {f"diptych_requests_held_total{{{JOB}}}": "3x30"},
    ),
    Alert(
        "DiptychRetries", "warning", "5m", f"{_rate('diptych_retries_total')} / {_rate('diptych_attempts_total')} > 0.05",
        "More than one attempt in twenty is a retry.",
        "The code label says what failed; a retry computes its prompt again unless it is cached.",
        {_RETRIES: "0+1x30", _ATTEMPTS: "0+9x30"}, {_RETRIES: "0x30", _ATTEMPTS: "0+9x30"},
    ),
    Alert(
        "DiptychKvDoesNotMove", "critical", "5m",
        f"{_rate('diptych_attempts_total', _APART)} > 0 unless {_rate('diptych_kv_transfer_bytes_total')} > 0",
        "Prompts go to prefill workers, and no KV reaches the decode workers.",
        "diptych doctor tries the link between every pair of workers; the decode workers' logs name each lane's transport.",
        {_ATTEMPTS: "0+9x30", _BYTES: "5x30"}, {_ATTEMPTS: "0+9x30", _BYTES: "0+5x30"},
    ),
    Alert(
        "DiptychTransfersFail", "warning", "5m",
        f"sum by (job, worker) (rate(diptych_worker_transfers_failed_total[{RATE}])) > 0",
        "Transfers of KV keep failing at {{ $labels.worker }}.",
        "Its log names the lane and the reason; diptych doctor tries the links.",
        {f"diptych_worker_transfers_failed_total{{{_WORKER}}}": "0+1x30"}, {f"diptych_worker_transfers_failed_total{{{_WORKER}}}": "1x30"},
        labels={"job": "diptych", "worker": "decode-0"},
    ),
    Alert(
        "DiptychHandOverExposed", "warning", "10m", _p90("diptych_kv_transfer_exposed_seconds") + " > 1",
        "One hand-over in ten keeps its request waiting for more than a second.",
        "See diptych_worker_grants_waiting (memory of the decode workers) and diptych_kv_transfer_seconds (the link).",
        _buckets("diptych_kv_transfer_exposed_seconds", "1.0", "10.0", True),
        _buckets("diptych_kv_transfer_exposed_seconds", "1.0", "10.0", False),
    ),
    Alert(
        "DiptychGrantsWait", "warning", "10m", 'diptych_worker_grants_waiting{phase="decode"} > 0',
        "Transfers wait for memory of {{ $labels.worker }} all the time.",
        "Its KV pool is the bottleneck: more decode workers, or a larger decode.kv_tokens.",
        {f"diptych_worker_grants_waiting{{{_WORKER}}}": "3x30"},
        {f"diptych_worker_grants_waiting{{{_WORKER}}}": "0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3"},
        labels={"job": "diptych", "phase": "decode", "worker": "decode-0"},
    ),
    Alert(
        "DiptychKvPoolFull", "warning", "10m", "vllm:kv_cache_usage_perc > 0.95",
        "The KV pool of {{ $labels.engine }} is full.",
        "Requests wait or are preempted: more workers, or larger pools (kv_tokens).",
        {f"vllm:kv_cache_usage_perc{{{_DECODE}}}": "0.99x30"}, {f"vllm:kv_cache_usage_perc{{{_DECODE}}}": "0.9x30"},
        labels={"engine": "decode-0", "job": "diptych", "phase": "decode"},
    ),
    Alert(
        "DiptychRecomputes", "warning", "10m",
        f"{_rate('diptych_worker_recomputed_tokens_total')} / {_rate('vllm:generation_tokens_total')} > 0.2",
        "Preempted requests are computed again: one token for every five that clients get.",
        "More running requests than the decode workers' memory holds: lower decode.max_running or raise decode.kv_tokens.",
        {f"diptych_worker_recomputed_tokens_total{{{_WORKER}}}": "0+50x30", f"vllm:generation_tokens_total{{{JOB}}}": "0+100x30"},
        {f"diptych_worker_recomputed_tokens_total{{{_WORKER}}}": "0+5x30", f"vllm:generation_tokens_total{{{JOB}}}": "0+100x30"},
    ),
    Alert(
        "DiptychSlowFirstToken", "warning", "10m", _p90("vllm:time_to_first_token_seconds") + " > 5",
        "One request in ten waits more than five seconds for its first token.",
        "Compare vllm:request_queue_time_seconds: if most of it is the queue, add prefill workers. Set the threshold to your own SLO.",
        _buckets("vllm:time_to_first_token_seconds", "5.0", "30.0", True),
        _buckets("vllm:time_to_first_token_seconds", "5.0", "30.0", False),
    ),
    Alert(
        "DiptychSlowTokens", "warning", "10m", _p90("vllm:request_time_per_output_token_seconds") + " > 0.25",
        "One request in ten gets fewer than four tokens a second.",
        "Too many requests run on each decode worker: add some, or lower decode.max_running. Set the threshold to your own SLO.",
        _buckets("vllm:request_time_per_output_token_seconds", "0.25", "2.5", True),
        _buckets("vllm:request_time_per_output_token_seconds", "0.25", "2.5", False),
    ),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The rule file."""
    return {"groups": [{"name": "diptych", "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, Any]:
    texts = {"summary": alert.summary, "description": alert.mend}
    return {"alert": alert.name, "expr": alert.expr, "for": alert.held, "labels": {"severity": alert.severity}, "annotations": texts}


def rule_tests() -> dict[str, Any]:
    """The tests for `promtool test rules`: each rule over its two histories of half an hour."""
    return {
        "rule_files": ["alerts.yaml"],
        "evaluation_interval": "1m",
        "tests": [_test(a, fires) for a in ALERTS for fires in (True, False)],
    }


def _test(alert: Alert, fires: bool) -> dict[str, Any]:
    series = [{"series": name, "values": values} for name, values in (alert.fires if fires else alert.quiet).items()]
    expected = [{"exp_labels": {"severity": alert.severity, **alert.labels}, "exp_annotations": _told(alert)}] if fires else []
    check = {"eval_time": "25m" if fires else "15m", "alertname": alert.name, "exp_alerts": expected}
    return {
        "name": f"{alert.name} {'fires' if fires else 'is quiet'}",
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [check],
    }


def _told(alert: Alert) -> dict[str, str]:
    summary = alert.summary
    for name, value in alert.labels.items():
        summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
    return {"summary": summary, "description": alert.mend}
