"""The cluster as `diptych top` shows it: values out of two scrapes. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...core.fleet import Phase
from ..load.slo import Slo
from .scraped import Change

TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
EXPOSED = "diptych_kv_transfer_exposed_seconds"


@dataclass(frozen=True, slots=True)
class Latency:
    """Of what ended meanwhile, in seconds; None of nothing. `met`: the share within the `slo`."""

    p50: float | None
    p90: float | None
    p99: float | None
    slo: float | None = None
    met: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """`kv_usage`: share of the pool in use. `blocks`: by state. `tokens_per_s`: of prompts computed here."""

    name: str
    phase: str
    up: bool
    running: int
    waiting: int
    kv_usage: float
    blocks: dict[str, int]
    leases: int
    grants_waiting: int
    steps_per_s: float | None
    tokens_per_s: float | None
    recomputed: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class TransferRow:
    """`bytes`, `count`: since the router started."""

    transport: str
    count: int
    bytes: int
    bytes_per_s: float | None
    p50: float | None
    p90: float | None


@dataclass(frozen=True, slots=True)
class Picture:
    """`seconds`: how long the changes took; None: they are all since the router started, and there are no rates."""

    model: str
    seconds: float | None
    running: int
    held: int
    ended: dict[str, int]
    paths: dict[str, int]
    retries: int
    refusals: dict[str, int]
    requests_per_s: float | None
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    ttft: Latency
    tpot: Latency
    queue: Latency
    exposed: Latency
    workers: tuple[WorkerRow, ...]
    transfers: tuple[TransferRow, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def picture(change: Change, slo: Slo) -> Picture:
    now = change.now
    model = next((labels["model_name"] for labels, _ in now.of("vllm:generation_tokens_total")), "?")
    names = [(labels["phase"], labels["worker"]) for labels, _ in now.of("diptych_worker_up")]
    return Picture(
        model=model,
        seconds=change.seconds if change.before.values else None,
        running=int(now.total("diptych_requests_running")),
        held=int(now.total("diptych_requests_held_total")),
        ended=_whole(now.by("diptych_requests_total", "outcome")),
        paths=_whole(now.by("diptych_attempts_total", "path")),
        retries=int(now.total("diptych_retries_total")),
        refusals=_whole(now.by("diptych_refusals_total", "reason")),
        requests_per_s=change.rate("diptych_requests_total"),
        prompt_tokens_per_s=change.rate("vllm:prompt_tokens_total"),
        output_tokens_per_s=change.rate("vllm:generation_tokens_total"),
        ttft=_latency(change, TTFT, slo.ttft),
        tpot=_latency(change, TPOT, slo.tpot),
        queue=_latency(change, "vllm:request_queue_time_seconds", None),
        exposed=_latency(change, EXPOSED, None),
        workers=tuple(_worker(change, name, phase) for phase, name in sorted(names, key=lambda pair: (pair[0] != Phase.PREFILL, pair[1]))),
        transfers=tuple(_transfer(change, transport) for transport in now.by("diptych_kv_transfer_bytes_total", "transport")),
    )


def _whole(sums: dict[str, float]) -> dict[str, int]:
    return {key: int(value) for key, value in sums.items()}


def _latency(change: Change, name: str, slo: float | None) -> Latency:
    p50, p90, p99 = (change.quantile(name, q) for q in (0.5, 0.9, 0.99))
    return Latency(p50, p90, p99, slo, None if slo is None else change.share_within(name, slo))


def _worker(change: Change, name: str, phase: str) -> WorkerRow:
    now = change.now

    def value(metric: str) -> int:
        return int(now.total(metric, worker=name))

    computed = "diptych_worker_computed_tokens_total" if phase == Phase.PREFILL else "diptych_worker_local_prefill_tokens_total"
    return WorkerRow(
        name=name,
        phase=phase,
        up=value("diptych_worker_up") > 0,
        running=int(now.total("vllm:num_requests_running", engine=name)),
        waiting=int(now.total("vllm:num_requests_waiting", engine=name)),
        kv_usage=now.total("vllm:kv_cache_usage_perc", engine=name),
        blocks=_whole(now.by("diptych_worker_blocks", "state", worker=name)),
        leases=value("diptych_worker_leases"),
        grants_waiting=value("diptych_worker_grants_waiting"),
        steps_per_s=change.rate("diptych_worker_steps_total", worker=name),
        tokens_per_s=change.rate(computed, worker=name),
        recomputed=value("diptych_worker_recomputed_tokens_total"),
        preemptions=value("diptych_worker_preemptions_total"),
    )


def _transfer(change: Change, transport: str) -> TransferRow:
    p50, p90 = (change.quantile("diptych_kv_transfer_seconds", q, transport=transport) for q in (0.5, 0.9))
    return TransferRow(
        transport=transport,
        count=int(change.now.total("diptych_kv_transfer_seconds_count", transport=transport)),
        bytes=int(change.now.total("diptych_kv_transfer_bytes_total", transport=transport)),
        bytes_per_s=change.rate("diptych_kv_transfer_bytes_total", transport=transport),
        p50=p50,
        p90=p90,
    )
