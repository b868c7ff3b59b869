"""How the kernels cut their work, per GPU: one table, read by shape. Nothing is tuned when a worker starts.

Not measured on any GPU: the numbers follow from what fits in shared memory and registers, as the compiler says (test_triton_compiles.py). A
program may take 227 KiB on compute capability 9 and 10, 163 on 8.0, 99 on 8.6, 8.9 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

ROOMY, MIDDLING, SMALL = "227 KiB", "163 KiB", "99 KiB"
SHARED_BYTES = {ROOMY: 227 << 10, MIDDLING: 163 << 10, SMALL: 99 << 10}
GENERATIONS = {(8, 0): MIDDLING, (8, 7): MIDDLING, (9, 0): ROOMY, (10, 0): ROOMY, (10, 3): ROOMY}
"""By compute capability; every other one is `SMALL`, which runs everywhere from 8.0 on."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys read at a time; `rows` (queries times the heads that share a key) of a program; its warps; and stages of Triton's pipeline, of
    which the block table takes its part: with 5 a tile of keys and values is on its way while the one before it is computed with; with
    fewer it is asked for and then waited for."""

    rows: int
    keys: int
    warps: int
    stages: int


DECODE = {
    ROOMY: {128: Tile(16, 128, 4, 5), 256: Tile(16, 64, 4, 5), 512: Tile(16, 32, 4, 5), 1024: Tile(16, 16, 4, 5)},
    MIDDLING: {128: Tile(16, 64, 4, 5), 256: Tile(16, 64, 4, 5), 512: Tile(16, 32, 4, 5), 1024: Tile(16, 16, 4, 5)},
    SMALL: {128: Tile(16, 64, 4, 5), 256: Tile(16, 32, 4, 5), 512: Tile(16, 16, 4, 5), 1024: Tile(16, 16, 4, 3)},
}
"""By the bytes of one key (head_dim, padded, times bytes of the dtype); `rows` is the least that a tensor core takes."""

CHUNKS = {
    ROOMY: {128: Tile(128, 64, 8, 5), 256: Tile(128, 64, 8, 5), 512: Tile(64, 64, 8, 5)},
    MIDDLING: {128: Tile(128, 64, 8, 5), 256: Tile(128, 64, 8, 5), 512: Tile(64, 32, 8, 5)},
    SMALL: {128: Tile(128, 64, 8, 5), 256: Tile(128, 32, 8, 5), 512: Tile(32, 32, 8, 5)},
}
"""As many rows as head dimensions where registers allow it: then no two warps share a row, and probabilities stay in registers."""
CHUNKS_FLOAT32 = {256: Tile(32, 32, 8, 2), 512: Tile(16, 32, 8, 2), 1024: Tile(16, 16, 8, 2)}
"""Everywhere: without tensor cores, larger tiles do not fit into registers."""

LEAST_KEYS, MOST_KEYS = 256, 2048
"""Of a split. Below the one, partial sums (fp32, written and read again) are more than 3 % of the keys and values at 4 heads a key; above
the other, a long sequence beside short ones would be left to too few programs."""
PROGRAMS_PER_CORE = 4


@dataclass(frozen=True, slots=True)
class Gpu:
    generation: str
    cores: int


def decode_tile(device: Gpu, head_dim: int, dtype: torch.dtype) -> Tile:
    """head_dim: padded to a power of two."""
    return DECODE[device.generation][max(128, head_dim * dtype.itemsize)]


def chunk_tile(device: Gpu, head_dim: int, dtype: torch.dtype) -> Tile:
    """head_dim: padded to a power of two."""
    table = CHUNKS_FLOAT32 if dtype is torch.float32 else CHUNKS[device.generation]
    return table[max(min(table), head_dim * dtype.itemsize)]


@cache
def gpu(device: torch.device) -> Gpu:
    """What the table asks of a device; in Triton's interpreter, on the CPU, a small one."""
    if device.type != "cuda":
        return Gpu(SMALL, 4)
    found = torch.cuda.get_device_properties(device)
    return Gpu(GENERATIONS.get((found.major, found.minor), SMALL), found.multi_processor_count)


def split_keys(rows: int, kv_heads: int, keys: int, cores: int) -> int:
    """Keys of one split of a decode whose tables reach `keys` keys. It follows from shapes alone, so a captured graph has it for good."""
    splits = max(1, -(-PROGRAMS_PER_CORE * cores // max(1, rows * kv_heads)))
    size = LEAST_KEYS
    while size < MOST_KEYS and size * splits < keys:
        size *= 2
    return size
