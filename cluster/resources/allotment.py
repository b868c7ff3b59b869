"""What each rank is given to compute on: a GPU or the CPU, and how much of its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.model import ModelCard
from ...core.transfer import Transport, transports_for
from ..process.spec import RankSpec, Worker
from .devices import CPU_FRACTION, GPU_FRACTION, Gpu, assign, share_of
from .memory import most_tokens, require_gpu_memory


def allot(
    config: ClusterConfig, card: ModelCard, workers: Sequence[Worker], gpus: Sequence[Gpu], present: Sequence[Worker] = ()
) -> list[Worker]:
    """`workers` with a device for each rank, beside those `present`, which keep theirs. `gpus`: those to compute on, none for the CPU.
    Raises `ConfigError` if there are too few, or the model does not fit."""
    if config.ray.joined and config.device == "cuda":
        return [_each(worker, _on_a_node(config, worker)) for worker in workers]
    if gpus:
        return _on_gpus(config, card, workers, gpus, present)
    ranks = sum(len(worker.ranks) for worker in (*present, *workers))
    return [_each(worker, _on_cpu(config, card, worker, ranks)) for worker in workers]


def _on_cpu(config: ClusterConfig, card: ModelCard, worker: Worker, ranks: int) -> dict[str, Any]:
    """`ranks`: of all workers of this host. On a joined Ray cluster what a node has is reserved before a rank is there to measure it."""
    fraction = _fraction(config, worker) or CPU_FRACTION / ranks
    tokens = worker.ranks[0].kv_tokens or (most_tokens(card, worker.ranks[0]) if config.ray.joined else None)
    return {"memory_fraction": fraction, "kv_tokens": tokens}


def _on_a_node(config: ClusterConfig, worker: Worker) -> dict[str, Any]:
    """On a joined Ray cluster Ray chooses the GPU, and the process sees that alone."""
    return {"device": "cuda", "memory_fraction": _fraction(config, worker) or GPU_FRACTION, "transports": _transports(config)}


def gpus_of(spec: RankSpec, ranks: int) -> float:
    """What Ray reserves for a rank of a worker of `ranks`. Those of one worker have one each, or Ray might put two on the same."""
    if spec.device == "cpu":
        return 0.0
    return 1.0 if ranks > 1 or spec.memory_fraction > 0.5 else spec.memory_fraction


def _transports(config: ClusterConfig) -> tuple[Transport, ...]:
    return transports_for(config.transfer.transports if "transports" in config.transfer.model_fields_set else (), on_gpu=True)


def _on_gpus(
    config: ClusterConfig, card: ModelCard, workers: Sequence[Worker], gpus: Sequence[Gpu], present: Sequence[Worker]
) -> list[Worker]:
    taken: defaultdict[str, float] = defaultdict(float)
    for spec in (spec for worker in present for spec in worker.ranks):
        taken[spec.gpu or ""] += spec.memory_fraction
    shared = _share(config, workers, gpus, present)
    fractions = [_fraction(config, worker) or (shared if len(worker.ranks) == 1 else GPU_FRACTION) for worker in workers]
    asked = [(worker.name, [fraction] * len(worker.ranks)) for worker, fraction in zip(workers, fractions, strict=True)]
    found = []
    for worker, fraction, given in zip(workers, fractions, assign(gpus, asked, taken), strict=True):
        ranks = [
            spec.model_copy(update={"device": "cuda", "gpu": gpu.key, "memory_fraction": fraction, "transports": _transports(config)})
            for spec, gpu in zip(worker.ranks, given, strict=True)
        ]
        for spec, gpu in zip(ranks, given, strict=True):
            _require(card, spec, int(fraction * gpu.size), worker)
        found.append(replace(worker, ranks=tuple(ranks)))
    return found


def _share(config: ClusterConfig, workers: Sequence[Worker], gpus: Sequence[Gpu], present: Sequence[Worker]) -> float:
    """What each worker of one rank takes of a GPU where nobody named a fraction: as many share one as must. Those of several ranks have
    theirs for themselves."""
    every = (*present, *workers)
    alone = sum(len(worker.ranks) == 1 for worker in every)
    left = len(gpus) - sum(len(worker.ranks) for worker in every if len(worker.ranks) > 1)
    if left < 1 or alone <= left or any(_fraction(config, worker) is not None for worker in every):
        return GPU_FRACTION
    return share_of(alone, left)


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
