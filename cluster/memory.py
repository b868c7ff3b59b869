"""Is there memory for a worker on this host? Asked before any is taken: the kernel's answer would be SIGKILL."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ConfigError
from ..core.layout import Layout

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
WORKER_BYTES = 300 << 20
"""Private memory of a worker before its pool: 230 MB for a process that imported torch and grpc, the rest buffers."""


def pool_bytes(layout: Layout) -> int:
    """Bytes of the KV pool of one worker."""
    return sum(
        blocks * layout.block_size * group.token_bytes * len(group.layers)
        for group, blocks in zip(layout.groups, layout.num_blocks, strict=True)
    )


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


def require_memory(layout: Layout, weights_bytes: int, available: int) -> None:
    """Raise `ConfigError` (field `kv_tokens`) if pool and weights do not fit into `available` bytes.

    Weights are counted although the page cache shares them: pages that do not fit are read from disk at every step.
    """
    pool = pool_bytes(layout)
    if pool + weights_bytes <= available:
        return
    raise ConfigError(
        f"Too little memory: a KV pool of {layout.num_blocks[0] * layout.block_size} tokens takes {_gib(pool)} and the weights "
        f"{_gib(weights_bytes)}, but {_gib(available)} are available. Lower kv_tokens, start fewer workers or free memory.",
        field="kv_tokens",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
