"""The one table of metric names, and the seam through which rooms record them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Histogram bounds in seconds."""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = SECONDS


METRICS: tuple[Metric, ...] = (
    Metric(
        "diptych_requests_total",
        "counter",
        "Requests that ended, by outcome (finish reason, length if any choice's, or error code).",
        ("outcome",),
    ),
    Metric("diptych_requests_running", "gauge", "Requests accepted and not yet ended."),
    Metric("diptych_requests_held_total", "counter", "Times a request had to wait because no worker could take it."),
    Metric("diptych_prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
    Metric("diptych_output_tokens_total", "counter", "Tokens sent to clients."),
    Metric("diptych_ttft_seconds", "histogram", "Time from acceptance to the first token."),
    Metric("diptych_tpot_seconds", "histogram", "Mean time per output token of a choice after its first."),
    Metric("diptych_itl_seconds", "histogram", "Time between two tokens of one choice, from the second token on."),
    Metric("diptych_handover_gap_seconds", "histogram", "Time between the first and the second token of a disaggregated request."),
    Metric("diptych_attempts_total", "counter", "Attempts opened, by path (disaggregated, local, prefill_only).", ("path",)),
    Metric("diptych_retries_total", "counter", "Attempts opened after one failed, by the failure's code.", ("code",)),
    Metric("diptych_kv_transfer_bytes_total", "counter", "KV bytes handed over, by transport.", ("transport",)),
    Metric("diptych_kv_transfer_seconds", "histogram", "First piece to last piece of a transfer.", ("transport",)),
    Metric("diptych_worker_up", "gauge", "1 while the worker's report is fresh.", ("worker", "phase")),
    Metric("diptych_worker_running", "gauge", "Attempts started on the worker.", ("worker", "phase")),
    Metric("diptych_worker_waiting", "gauge", "Attempts waiting on the worker.", ("worker", "phase")),
    Metric("diptych_worker_kv_usage_ratio", "gauge", "Share of the worker's KV blocks in use.", ("worker", "phase")),
    Metric("diptych_worker_leases", "gauge", "Transfers holding blocks on the worker.", ("worker", "phase")),
    Metric("diptych_worker_steps_total", "counter", "Engine steps.", ("worker", "phase")),
    Metric("diptych_worker_computed_tokens_total", "counter", "Prompt tokens computed.", ("worker", "phase")),
    Metric("diptych_worker_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.", ("worker", "phase")),
    Metric(
        "diptych_worker_local_prefill_tokens_total", "counter", "Prompt tokens a decode worker computed by request.", ("worker", "phase")
    ),
    Metric("diptych_worker_recomputed_tokens_total", "counter", "Tokens recomputed after preemption.", ("worker", "phase")),
    Metric("diptych_worker_preemptions_total", "counter", "Times a running request gave its memory back.", ("worker", "phase")),
    Metric("diptych_worker_checks_total", "counter", "Times a worker's books were checked and found right.", ("worker", "phase")),
    Metric("diptych_worker_idle_checks_total", "counter", "Those of them when it was idle and held nothing.", ("worker", "phase")),
    Metric("diptych_worker_transfers_failed_total", "counter", "Transfers that failed or were refused.", ("worker", "phase")),
)


class Recorder(Protocol):
    """Records values under names of `METRICS`; an unknown name or label is a defect and raises `KeyError`."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None: ...

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class NullRecorder:
    """Records nothing: for tests and tools that have no exporter."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        return None

    def set(self, name: str, value: float, **labels: str) -> None:
        return None

    def observe(self, name: str, value: float, **labels: str) -> None:
        return None
