"""The same attention by others: torch's over keys and values that it gathers first, and FlashInfer's paged kernels where it is installed.

Query [rows, heads, head_dim], cache [blocks, kv_heads, 2, block_size, head_dim], a table for each sequence. FlashInfer is no dependency of
anything: it is compared where somebody has it. What it plans for a batch is planned before it is timed, as a server plans once for all
layers; keys and values are views of our cache, which has them behind each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from diptych.benchmarks.gpu import Clock
from torch import Tensor

Run = Callable[[], object]
WORKSPACE = 256 << 20
"""Bytes that FlashInfer splits long contexts into; what its examples give it is half of that."""
HAS_FLASHINFER = find_spec("flashinfer") is not None


def gathered(query: Tensor, cache: Tensor, tables: Sequence[Sequence[int]]) -> Run:
    """One new token for each sequence; all their contexts fill their blocks. [rows, heads * head_dim]."""
    order = torch.tensor(tables, device=cache.device)
    rows, kv_heads, head_dim = len(tables), cache.shape[1], cache.shape[-1]

    def run() -> Tensor:
        found = cache[order].permute(3, 0, 2, 1, 4, 5).reshape(2, rows, kv_heads, -1, head_dim)
        return F.scaled_dot_product_attention(query[:, :, None], found[0], found[1], enable_gqa=True).flatten(1)

    return run


def flashinfer_decode(query: Tensor, cache: Tensor, tables: Sequence[Sequence[int]]) -> Run | None:
    """As `gathered`; None where FlashInfer is not installed."""
    if not HAS_FLASHINFER:
        return None
    keys, values = cache[:, :, 0], cache[:, :, 1]

    def planned() -> Run:
        # Tensor cores pay from four queries a key on, which is what FlashInfer's manual says of them.
        grouped = query.shape[1] >= 4 * cache.shape[1]
        attention = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(_workspace(cache), "HND", use_tensor_cores=grouped)
        attention.plan(*_pages(cache, tables), *_heads(query, cache), q_data_type=query.dtype, kv_data_type=cache.dtype)
        return lambda: attention.run(query, (keys, values))

    return _once(planned)


def flashinfer_prefill(query: Tensor, cache: Tensor, table: Sequence[int]) -> Run | None:
    """The last tokens of one sequence, causal; None where FlashInfer is not installed."""
    if not HAS_FLASHINFER:
        return None
    keys, values = cache[:, :, 0], cache[:, :, 1]

    def planned() -> Run:
        attention = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(_workspace(cache), "HND")
        tokens = torch.tensor([0, len(query)], dtype=torch.int32, device=cache.device)
        types = {"q_data_type": query.dtype, "kv_data_type": cache.dtype}
        attention.plan(tokens, *_pages(cache, [table]), *_heads(query, cache), causal=True, **types)
        return lambda: attention.run(query, (keys, values))

    return _once(planned)


def timed(name: str, run: Run, clock: Clock) -> float | None:
    """Milliseconds; None if it does not take such a shape, or has no memory for it, which is said."""
    try:
        return clock(run)
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"{name} does not take this: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        return None


def _once(planned: Callable[[], Run]) -> Run:
    """Planned at the first call, which no clock counts: it is where a shape is refused."""
    runs: list[Run] = []

    def run() -> object:
        if not runs:
            runs.append(planned())
        return runs[0]()

    return run


def _workspace(cache: Tensor) -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=cache.device)


def _heads(query: Tensor, cache: Tensor) -> tuple[int, int, int, int]:
    return query.shape[1], cache.shape[1], cache.shape[4], cache.shape[3]


def _pages(cache: Tensor, tables: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's blocks begin, the blocks, and how full the last is: to the brim."""
    begins = [0]
    for table in tables:
        begins.append(begins[-1] + len(table))
    parts = (begins, [block for table in tables for block in table], [cache.shape[3]] * len(tables))
    begin, blocks, last = (torch.tensor(part, dtype=torch.int32, device=cache.device) for part in parts)
    return begin, blocks, last
