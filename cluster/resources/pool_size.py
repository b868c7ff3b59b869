"""How many blocks a worker's pools have where nobody named a number: what each rank can hold beside all else, and the smallest of them."""

from __future__ import annotations

import logging

import torch
from torch.distributed.distributed_c10d import Store

from ...core.errors import ConfigError
from ...core.layout import Layout
from ...core.model import ModelCard
from ..process.spec import BLOCK_SIZE, RankSpec, rank_name
from .memory import CUDA_BYTES, LEAST_TOKENS, available_bytes, blocks_in, gib, most_tokens, staging_bytes

log = logging.getLogger(__name__)


def blocks_here(card: ModelCard, spec: RankSpec, layout: Layout, device: torch.device, graph_bytes: int = 0) -> int:
    """How many blocks of each group this rank can hold. To be asked when weights and communicators are there and a step has been computed.
    `layout`: of its own pool, with any number of blocks; `graph_bytes`: what is to be left for CUDA graphs. Raises `ConfigError` if it is
    less than the least."""
    free = _free_on_gpu(device, spec.memory_fraction) if device.type == "cuda" else _free_here(card, spec)
    free -= staging_bytes(card, spec) + graph_bytes
    blocks = blocks_in(layout, free, card.dtype)
    if blocks * BLOCK_SIZE < LEAST_TOKENS:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this host"
        raise ConfigError(
            f"{card.name} leaves {rank_name(spec)} {gib(max(0, free))} of {where} for its KV pool "
            f"(memory_fraction {spec.memory_fraction:g}), which is not enough for {LEAST_TOKENS} tokens: give it a larger memory_fraction, "
            "spread the worker over more ranks, or free memory.",
            field="memory_fraction",
        )
    return min(blocks, -(-most_tokens(card, spec) // BLOCK_SIZE)) if device.type == "cpu" else blocks


def smallest(blocks: int, rank: int, ranks: int, store: Store | None) -> tuple[int, int]:
    """The least that any rank of the worker can hold, and the first rank that holds no more. All ranks call it, and find the same; `store`
    is theirs, None if there is but one."""
    if store is None:
        return blocks, rank
    store.set(f"blocks/{rank}", str(blocks))
    counts = [int(store.get(f"blocks/{other}")) for other in range(ranks)]
    return min(counts), counts.index(min(counts))


def say_size(spec: RankSpec, blocks: int, decided: int, ranks: int) -> None:
    """The leader's log tells whose memory decided."""
    tokens = blocks * BLOCK_SIZE
    if ranks == 1:
        log.info("The KV pool has %d blocks, %d tokens, as much as memory allows.", blocks, tokens)
    elif spec.rank == 0:
        log.info("The KV pool of each rank has %d blocks, %d tokens: rank %d of %d has room for no more.", blocks, tokens, decided, ranks)


def _free_here(card: ModelCard, spec: RankSpec) -> int:
    """The rank's share of what is left beside all weights: pages of theirs that do not stay would be read from disk at every step."""
    return int(spec.memory_fraction * (available_bytes() - card.weights_bytes))


def _free_on_gpu(device: torch.device, fraction: float) -> int:
    """What is left of the rank's fraction, and not more than is free: other processes may have taken of it. What torch held at most in the
    step just computed, weights included, it will hold again."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(fraction * total) - torch.cuda.max_memory_reserved(device) - CUDA_BYTES)
