"""A piece as one run of bytes: what a staging slot holds and what crosses a two-sided transport.

Layer after layer, block after block, as they lie in the pool; of a block covered in part only those tokens' rows, K and V of each
head on their own. Both ends compute the order from the span alone.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from .coverage import Span
from .geometry import runs
from .memory import copy_runs
from .pool import Pool
from .staging import ROW

WORDS = ROW // 8


def pack(pool: Pool, span: Span, blocks: tuple[int, ...], slot: Tensor) -> None:
    """Copy `span`, which lies in `blocks`, to the beginning of `slot` (uint8)."""
    _move(pool, span, blocks, slot, into_pool=False)


def unpack(pool: Pool, span: Span, blocks: tuple[int, ...], slot: Tensor) -> None:
    """The inverse of `pack`: the beginning of `slot` into `blocks`."""
    _move(pool, span, blocks, slot, into_pool=True)


def _move(pool: Pool, span: Span, blocks: tuple[int, ...], slot: Tensor, *, into_pool: bool) -> None:
    layout = pool.layout
    found = runs(layout.groups[span.group], layout.block_size, span.start, span.stop, blocks, blocks)
    staged = slot.data_ptr()
    for layer in span.layers:
        there = pool.address + pool.geometry.offsets[layer]
        packed: list[tuple[int, int, int]] = []
        end = 0
        for offset, _, length in found:
            packed.append((end, offset, length) if into_pool else (offset, end, length))
            end += length
        copy_runs(staged if into_pool else there, there if into_pool else staged, packed)
        staged += end


def checksum(slot: Tensor, length: int) -> int:
    """Of the first `length` bytes of `slot` (uint8, a multiple of `ROW` long): CRC-32 over the sums of all rows and all columns of its
    table of 64-bit words.

    A word that changes changes a row and a column, so does one that moves. Twice a sum runs at 4.5 GB/s on one core here, CRC-32 over
    everything at 0.3.
    """
    whole = -(-length // ROW) * ROW
    slot[length:whole] = 0
    table = slot[:whole].view(torch.int64).view(-1, WORDS)
    return zlib.crc32(table.sum(1).numpy().data, zlib.crc32(table.sum(0).numpy().data))
