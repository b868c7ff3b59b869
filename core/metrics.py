"""The one table of metrics, and the seam through which rooms record them.

What vLLM has a name for is called that (`vllm:…`), so that dashboards and autoscalers made for it work; the rest is `diptych_*`. The page
docs/metrics.md, the dashboard and the alert rules are made from this table. Every label has few values: those listed with it, or the
workers' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from .errors import DiptychError
from .fleet import Phase
from .request import FinishReason
from .transfer import RefusedReason, Transport

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Histogram bounds in seconds."""
FINE_SECONDS = (0.0001, 0.00025, 0.0005, *SECONDS)
"""For what is shorter: 1 MiB of KV crosses shared memory in 0.1 ms."""

VLLM = "vllm:"
MODEL = "model_name"
"""Label of every name of vLLM's, as there; the exporter fills it in."""

PATHS = ("disaggregated", "local", "prefill_only")
ACROSS = ("gone", "full", "failed", "unlike")
BLOCK_STATES = ("free", "cached", "referenced", "fenced")


@dataclass(frozen=True, slots=True)
class Label:
    """`values` it may have; (): workers' names, as many as the fleet has."""

    name: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """`help` is a sentence for `/metrics` and for the docs."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = SECONDS

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that a value is recorded with."""
        return tuple(label.name for label in self.labels)

    @property
    def of_worker(self) -> bool:
        """Whether each worker has its own; its first two labels are then the worker's name and its phase."""
        return len(self.labels) > 1 and self.labels[1] is PHASE

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples."""
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.kind == "histogram" else (self.name,)


def _codes(error: type[DiptychError]) -> Iterator[str]:
    yield error.code
    for kind in error.__subclasses__():
        yield from _codes(kind)


CODES = tuple(dict.fromkeys(sorted(_codes(DiptychError))))
"""Of all errors."""
PHASE = Label("phase", tuple(Phase))
_OUTCOME = Label("outcome", (*FinishReason, *CODES))
_REASON = Label("reason", CODES)
_TRANSPORT = Label("transport", tuple(Transport))
_WORKER = (Label("worker"), PHASE)
_ENGINE = (Label("engine"), PHASE)

METRICS: tuple[Metric, ...] = (
    Metric("vllm:num_requests_running", "gauge", "Attempts that the worker has started; on a decode worker each choice counts.", _ENGINE),
    Metric(
        "vllm:num_requests_waiting",
        "gauge",
        "Attempts that the worker has not started; on a decode worker also those whose KV is awaited.",
        _ENGINE,
    ),
    Metric("vllm:kv_cache_usage_perc", "gauge", "Share of the worker's KV blocks that are in use, 0 to 1.", _ENGINE),
    Metric("vllm:prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
    Metric("vllm:generation_tokens_total", "counter", "Tokens sent to clients."),
    Metric("vllm:request_success_total", "counter", "Requests answered in full.", (Label("finished_reason", tuple(FinishReason)),)),
    Metric("vllm:time_to_first_token_seconds", "histogram", "Time from acceptance to the first token."),
    Metric("vllm:request_time_per_output_token_seconds", "histogram", "Mean time per output token of a request after its first (TPOT)."),
    Metric("vllm:inter_token_latency_seconds", "histogram", "Time between two tokens of one choice; the hand-over gap is reported apart."),
    Metric("vllm:e2e_request_latency_seconds", "histogram", "Time from acceptance to the end of requests answered in full."),
    Metric("vllm:request_queue_time_seconds", "histogram", "Time an attempt waited at the worker that reads its prompt, until that began."),
    Metric(
        "diptych_requests_total",
        "counter",
        "Requests that ended, by outcome: finish reason (length if any choice's), or error code.",
        (_OUTCOME,),
    ),
    Metric("diptych_requests_running", "gauge", "Requests accepted and not yet ended."),
    Metric("diptych_requests_held_total", "counter", "Times a request had to wait because no worker could take it."),
    Metric("diptych_refusals_total", "counter", "Requests refused before anything was computed for them, by error code.", (_REASON,)),
    Metric("diptych_handover_gap_seconds", "histogram", "Time between the first and the second token of a disaggregated request."),
    Metric(
        "diptych_attempts_total",
        "counter",
        "Attempts opened, by path; local: the decode worker reads the prompt, prefill_only: one token was wanted.",
        (Label("path", PATHS),),
    ),
    Metric(
        "diptych_attempts_across_total",
        "counter",
        "Attempts whose KV leaves its pair of workers, by what keeps the prefill worker's partner from taking it.",
        (Label("why", ACROSS),),
    ),
    Metric("diptych_retries_total", "counter", "Attempts opened after one failed, by the failure's code.", (Label("code", CODES),)),
    Metric(
        "diptych_moves_total",
        "counter",
        "Attempts opened in place of one that a worker had not begun: it leaves or is gone, or others wait there while one has come.",
    ),
    Metric("diptych_kv_transfer_bytes_total", "counter", "KV bytes handed over.", (_TRANSPORT,)),
    Metric("diptych_kv_transfer_seconds", "histogram", "First piece to last piece of a transfer.", (_TRANSPORT,), FINE_SECONDS),
    Metric(
        "diptych_kv_transfer_exposed_seconds",
        "histogram",
        "Part of a hand-over that computing does not hide: from the first token drawn to the destination's Ack, any wait included.",
        (_TRANSPORT,),
        FINE_SECONDS,
    ),
    Metric("diptych_worker_up", "gauge", "1 while the worker's report is fresh.", _WORKER),
    Metric("diptych_worker_leases", "gauge", "Transfers holding blocks on the worker.", _WORKER),
    Metric("diptych_worker_grants_waiting", "gauge", "Transfers offered and not yet granted, at either end.", _WORKER),
    Metric("diptych_worker_blocks", "gauge", "KV blocks of all cache groups, by state.", (*_WORKER, Label("state", BLOCK_STATES))),
    Metric("diptych_worker_steps_total", "counter", "Engine steps.", _WORKER),
    Metric(
        "diptych_worker_role_flips_total",
        "counter",
        "Roles that the worker's process had before, on the same weights; 0 of one that was started for the role it has.",
        _WORKER,
    ),
    Metric("diptych_worker_eager_steps_total", "counter", "Steps of decodes alone that a GPU computed without a CUDA graph.", _WORKER),
    Metric("diptych_worker_computed_tokens_total", "counter", "Prompt tokens a prefill worker computed.", _WORKER),
    Metric("diptych_worker_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.", _WORKER),
    Metric("diptych_worker_local_prefill_tokens_total", "counter", "Prompt tokens a decode worker computed by request.", _WORKER),
    Metric("diptych_worker_recomputed_tokens_total", "counter", "Tokens recomputed after preemption.", _WORKER),
    Metric("diptych_worker_preemptions_total", "counter", "Times a running request gave its memory back.", _WORKER),
    Metric("diptych_worker_checks_total", "counter", "Times a worker's books were checked and found right (tests).", _WORKER),
    Metric("diptych_worker_idle_checks_total", "counter", "Those of them when it was idle and held nothing.", _WORKER),
    Metric("diptych_worker_transfers_failed_total", "counter", "Transfers that failed or were refused.", _WORKER),
    Metric(
        "diptych_worker_transfers_refused_total",
        "counter",
        "Offers that a decode worker refused.",
        (*_WORKER, Label("reason", tuple(RefusedReason))),
    ),
    Metric(
        "diptych_worker_pool_refusals_total",
        "counter",
        "Processes that asked for the memory of a pool and got nothing: another user's, or without what is said on lanes.",
        _WORKER,
    ),
)


class Recorder(Protocol):
    """Records values under names of `METRICS`; an unknown name, label or label's value is a defect and raises `KeyError`."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None: ...

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...

    def forget(self, worker: str, phase: str) -> None:
        """Drop what is recorded of a worker: it has left for good."""
        ...


class NullRecorder:
    """Records nothing: for tests and tools that have no exporter."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        return None

    def set(self, name: str, value: float, **labels: str) -> None:
        return None

    def observe(self, name: str, value: float, **labels: str) -> None:
        return None

    def forget(self, worker: str, phase: str) -> None:
        return None
