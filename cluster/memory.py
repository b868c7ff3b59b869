"""Is there memory for a rank on this host? Asked before any is taken: the kernel's answer would be SIGKILL."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ConfigError
from ..core.layout import Layout
from ..core.model import Decoder, ModelCard
from ..core.transfer import Transport
from ..kv_transfer.staging import pair_bytes
from .spec import BLOCK_SIZE, RankSpec

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
WORKER_BYTES = 300 << 20
"""Private memory of a rank before its pool: 230 MB for a process that imported torch and grpc, the rest buffers."""
TRANSFORMERS_BYTES = 120 << 20
"""What importing transformers adds to that."""


def pool_bytes(layout: Layout) -> int:
    """Bytes of the KV pool of one rank, whose own `layout` this is."""
    return sum(
        blocks * layout.block_size * group.token_bytes * len(group.layers)
        for group, blocks in zip(layout.groups, layout.num_blocks, strict=True)
    )


def process_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Private memory of a rank before its pool. Shards copy the weights they cut by columns (`engine.shards`)."""
    copied = 0
    if isinstance(card.decoder, Decoder) and spec.tp > 1:
        inputs = card.decoder.heads * card.decoder.head_dim + card.decoder.intermediate
        copied = _layers(card, spec) * card.decoder.hidden * inputs // spec.tp * card.dtype.itemsize
    return WORKER_BYTES + (TRANSFORMERS_BYTES if card.slow_path else 0) + copied


def kv_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Bytes a rank takes for KV: its pool, and the staging slots of the gloo pairs it may make. It is not known yet with which workers
    shared memory works, and a pair is made while the worker serves: too late to find that there is no room."""
    layout = card.layout(block_size=BLOCK_SIZE, kv_tokens=spec.kv_tokens, tp=spec.tp, stages=spec.stages)
    pairs = spec.pairs if Transport.GLOO in spec.transports else 0
    return pool_bytes(layout.on(spec.rank).layout) + pairs * pair_bytes(layout)


def weights_bytes(card: ModelCard, spec: RankSpec) -> int:
    """Bytes of the weights that a rank reads, nearly: its share of its layers, and of embedding and head if its stage has them."""
    if not isinstance(card.decoder, Decoder):
        return card.weights_bytes
    table = card.vocab_size * card.decoder.hidden * card.dtype.itemsize
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
    wanted, weights = kv_bytes(card, spec), weights_bytes(card, spec)
    if wanted + weights <= available:
        return
    raise ConfigError(
        f"Too little memory: a KV pool of {spec.kv_tokens} tokens, with staging for its transfers, takes {_gib(wanted)} and the weights "
        f"{_gib(weights)}, but {_gib(available)} are available. Lower kv_tokens, start fewer workers or free memory.",
        field="kv_tokens",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
