"""What each rank is given to compute on: a GPU or the CPU, and how much of its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..core.config import ClusterConfig
from ..core.errors import ConfigError
from ..core.model import ModelCard
from ..core.transfer import transports_for
from .devices import CPU_FRACTION, GPU_FRACTION, Gpu, assign
from .memory import most_tokens, require_gpu_memory
from .spec import RankSpec, Worker


def allot(
    config: ClusterConfig, card: ModelCard, workers: Sequence[Worker], gpus: Sequence[Gpu], present: Sequence[Worker] = ()
) -> list[Worker]:
    """`workers` with a device for each rank, beside those `present`, which keep theirs. `gpus`: those to compute on, none for the CPU.
    Raises `ConfigError` if there are too few, or the model does not fit."""
    if gpus:
        return _on_gpus(config, card, workers, gpus, present)
    ranks = sum(len(worker.ranks) for worker in (*present, *workers))
    return [_each(worker, _on_cpu(config, card, worker, ranks)) for worker in workers]


def _on_cpu(config: ClusterConfig, card: ModelCard, worker: Worker, ranks: int) -> dict[str, Any]:
    """`ranks`: of all workers of this host. On a joined Ray cluster what a node has is reserved before a rank is there to measure it."""
    fraction = _fraction(config, worker) or CPU_FRACTION / ranks
    tokens = worker.ranks[0].kv_tokens or (most_tokens(card, worker.ranks[0]) if config.ray.joined else None)
    return {"memory_fraction": fraction, "kv_tokens": tokens}


def _on_gpus(
    config: ClusterConfig, card: ModelCard, workers: Sequence[Worker], gpus: Sequence[Gpu], present: Sequence[Worker]
) -> list[Worker]:
    if config.ray.joined:
        raise ConfigError(
            "device: on a joined Ray cluster workers compute on CPUs; leave ray.address out, or say device: cpu.", field="device"
        )
    taken: defaultdict[str, float] = defaultdict(float)
    for spec in (spec for worker in present for spec in worker.ranks):
        taken[spec.gpu or ""] += spec.memory_fraction
    asked_for = config.transfer.transports if "transports" in config.transfer.model_fields_set else ()
    transports = transports_for(asked_for, on_gpu=True)
    fractions = [_fraction(config, worker) or GPU_FRACTION for worker in workers]
    asked = [(worker.name, [fraction] * len(worker.ranks)) for worker, fraction in zip(workers, fractions, strict=True)]
    found = []
    for worker, fraction, given in zip(workers, fractions, assign(gpus, asked, taken), strict=True):
        ranks = [
            spec.model_copy(update={"device": "cuda", "gpu": gpu.key, "memory_fraction": fraction, "transports": transports})
            for spec, gpu in zip(worker.ranks, given, strict=True)
        ]
        for spec, gpu in zip(ranks, given, strict=True):
            _require(card, spec, int(fraction * gpu.size), worker)
        found.append(replace(worker, ranks=tuple(ranks)))
    return found


def _require(card: ModelCard, spec: RankSpec, allowed: int, worker: Worker) -> None:
    try:
        require_gpu_memory(card, spec, allowed)
    except ConfigError as error:
        key = f"{worker.section}.{error.field}"
        raise ConfigError(f"{key}: {error.message}", field=key) from None


def _fraction(config: ClusterConfig, worker: Worker) -> float | None:
    return config.section(worker.phase).all_groups[worker.group].memory_fraction


def _each(worker: Worker, update: dict[str, Any]) -> Worker:
    return replace(worker, ranks=tuple(spec.model_copy(update=update) for spec in worker.ranks))
