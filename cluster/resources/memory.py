"""Is there memory for a rank on this host? Asked before any is taken: the kernel's answer would be SIGKILL."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ...core.errors import ConfigError
from ...core.layout import DType, Layout, even_stages
from ...core.model import Decoder, ModelCard
from ...kv_transfer.staging import pair_bytes
from ..process.spec import BLOCK_SIZE, RankSpec

MANY = sys.maxsize
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
WORKER_BYTES = 300 << 20
"""Private memory of a rank before its pool: 230 MB for a process that imported torch and grpc, the rest buffers."""
TRANSFORMERS_BYTES = 120 << 20
"""What importing transformers adds to that."""
CUDA_BYTES = 600 << 20
"""Of a GPU what a process takes that torch does not count: context, kernels, cuBLAS, NCCL's buffers. Not measured by us: an allowance."""
LEAST_TOKENS = 256
"""A pool smaller than that serves nobody."""
RUNNING_TOKENS = 1024
"""On a CPU a pool that sizes itself holds so many tokens for each request of a batch and no more: the rest of a host's memory is other
programs'. Of Gemma 3 270M in bfloat16, with 32 requests, that is 0.6 GB."""


def pool_bytes(layout: Layout) -> int:
    """Bytes of the KV pool of one rank, whose own `layout` this is."""
    return sum(
        blocks * layout.block_size * group.token_bytes * len(group.layers)
        for group, blocks in zip(layout.groups, layout.num_blocks, strict=True)
    )


def process_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Private memory of a rank before its pool. Shards copy the weights they cut by columns (`engine.shards`), which on a GPU
    are there, and here one at a time."""
    copied = 0
    if isinstance(card.decoder, Decoder) and spec.tp > 1 and spec.device == "cpu":
        inputs = (card.decoder.heads * card.decoder.head_dim, card.decoder.intermediate)
        copied = _layers(card, spec) * sum(card.matrix_bytes(card.decoder.hidden, each // spec.tp) for each in inputs)
    return WORKER_BYTES + (TRANSFORMERS_BYTES if card.slow_path else 0) + copied


def kv_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Bytes of this host's memory a rank takes for KV: its pool, the least if it sizes itself, and `staging_bytes`."""
    return _least_pool(card, spec) + staging_bytes(card, spec) if spec.device == "cpu" else 0


def _least_pool(card: ModelCard, spec: RankSpec) -> int:
    return pool_bytes(rank_layout(card, spec, spec.kv_tokens or LEAST_TOKENS))


def staging_bytes(card: ModelCard, spec: RankSpec) -> int:
    """The slots of the pairs it may make (gloo's, on a GPU nccl's), where its pool is. It is not known yet with which workers a one-sided
    transport works, and a pair is made while the worker serves: too late to find that there is no room."""
    layout = _layout(card, spec, LEAST_TOKENS)
    return sum(spec.pairs * pair_bytes(layout) for transport in spec.transports if transport.two_sided)


def rank_layout(card: ModelCard, spec: RankSpec, tokens: int) -> Layout:
    """Of the rank's own pool, were it of so many tokens."""
    return _layout(card, spec, tokens).on(spec.rank).layout


def _layout(card: ModelCard, spec: RankSpec, tokens: int) -> Layout:
    return card.layout(block_size=BLOCK_SIZE, kv_tokens=tokens, tp=spec.tp, stages=spec.stages, kv_dtype=spec.kv_dtype)


def blocks_in(layout: Layout, free: int, read: DType) -> int:
    """How many blocks of each group of a rank's own `layout` `free` bytes hold, beside what attention gathers of one layer at a time, as
    `read`, the weights' dtype: every key and value once, and as much again in padding. `MANY` for a rank without KV."""
    block = pool_bytes(replace(layout, num_blocks=(1,) * len(layout.groups)))
    gathered = 2 * max((layout.block_size * replace(group, dtype=read).token_bytes for group in layout.groups if group.layers), default=0)
    return max(0, free) // (block + gathered) if block else MANY


def most_tokens(card: ModelCard, spec: RankSpec) -> int:
    """The most that a pool which sizes itself holds on a CPU."""
    return max(LEAST_TOKENS, spec.max_running * min(RUNNING_TOKENS, card.max_context))


def weights_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Bytes of the weights that a rank reads, nearly: its share of its layers, and of embedding and head if its stage has them."""
    if not isinstance(card.decoder, Decoder):
        return card.weights_bytes
    table = card.table_bytes(card.vocab_size, card.decoder.hidden)
    ends = [spec.rank // spec.tp == 0, spec.rank // spec.tp == max(1, len(spec.stages)) - 1]
    tables = any(ends) if card.decoder.tied_head else sum(ends)
    layers = max(0, card.weights_bytes - table * (1 if card.decoder.tied_head else 2))
    return (layers * _layers(card, spec) // card.decoder.layers + table * tables) // spec.tp


def _layers(card: ModelCard, spec: RankSpec) -> int:
    return spec.stages[spec.rank // spec.tp] if spec.stages else card.decoder.layers


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that can still be taken: what the kernel says for the host, less where the process's cgroup allows less.

    Page cache (a mapped model's pages among it) counts as available in both, as the kernel gives it up on demand.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # cgroup v1, or none: the host's word stands
        return available
    cached = int(stat["active_file"]) + int(stat["inactive_file"])
    return available if limit == "max" else min(available, max(0, int(limit) - used + cached))


def require_memory(card: ModelCard, spec: RankSpec, available: int) -> None:
    """Raise `ConfigError` (field `kv_tokens`) if what the rank takes for KV and its part of the weights do not fit into `available` bytes.

    Weights are counted although the page cache shares them: pages that do not fit are read from disk at every step.
    """
    wanted, weights = kv_bytes(card, spec), weights_bytes(card, spec) if spec.device == "cpu" else 0
    if wanted + weights <= available:
        return
    tokens = spec.kv_tokens or LEAST_TOKENS
    lower = "Lower kv_tokens, start" if spec.kv_tokens else "Start"
    raise ConfigError(
        f"Too little memory: a KV pool of {tokens} tokens, with staging for its transfers, takes {gib(wanted)} and the weights "
        f"{gib(weights)}, but {gib(available)} are available. {lower} fewer workers or free memory.",
        field="kv_tokens",
    )


def require_gpu_memory(card: ModelCard, spec: RankSpec, allowed: int) -> None:
    """Raise `ConfigError` (field `tp`) if the rank's part of the weights and the least pool do not fit into `allowed` bytes of a GPU; it
    names the tensor parallelism that would."""
    if gpu_bytes(card, spec) <= allowed:
        return
    spread = f"tp {spec.tp}, pp {max(1, len(spec.stages))}"
    raise ConfigError(
        f"{card.name} does not fit with {spread}: rank {spec.rank} has {gib(weights_bytes(card, spec))} of its weights, and with the least "
        f"KV pool and what CUDA needs takes {gib(gpu_bytes(card, spec))} of a GPU, of which it may take {gib(allowed)}. "
        f"{_would(card, spec, allowed)}",
        field="tp",
    )


def gpu_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Of a GPU, what a rank takes at least."""
    return CUDA_BYTES + weights_bytes(card, spec) + _least_pool(card, spec) + staging_bytes(card, spec)


def _would(card: ModelCard, spec: RankSpec, allowed: int) -> str:
    decoder = card.decoder
    if isinstance(decoder, Decoder):
        for tp in range(spec.tp + 1, decoder.heads + 1):
            if decoder.can_split(tp) and gpu_bytes(card, spec.model_copy(update={"tp": tp, "rank": spec.rank // spec.tp * tp})) <= allowed:
                return f"tp {tp} would."
        for pp in range(max(1, len(spec.stages)) + 1, decoder.layers + 1):
            stages = even_stages(decoder.layers, pp)
            if all(gpu_bytes(card, spec.model_copy(update={"stages": stages, "rank": rank * spec.tp})) <= allowed for rank in (0, pp - 1)):
                return f"pp {pp} would."
    return "No tp would; a larger GPU, or a larger memory_fraction, may."


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
