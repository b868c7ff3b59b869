"""A piece as one run of bytes: what a staging slot holds and what crosses a two-sided transport.

Layer after layer, block after block of the source's block size, in the source's dtype: of a block's heads and tokens those that cross, as
[heads, 2, tokens, head_dim]. Both ends compute the order from the span and the route; the destination casts.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..kernels.copy_runs import copy_runs
from .coverage import Span
from .crossing import Crossing
from .memory import cast_runs
from .pool import DTYPES, Pool
from .staging import ROW

WORDS = ROW // 8


def pack(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: Tensor) -> None:
    """Copy `span`, which lies in `blocks` of the source's `pool`, to the beginning of `slot` (uint8)."""
    copy_runs([(_layers(pool, crossing, span, slot), crossing.packed(span, blocks))], again=True)


def unpack(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: Tensor) -> None:
    """The inverse of `pack`: the beginning of `slot` into `blocks` of the destination's `pool`."""
    found, layers = crossing.unpacked(span, blocks), _layers(pool, crossing, span, slot)
    if not crossing.casts(span.group):
        copy_runs([([(staged, there) for there, staged in layers], found)])
        return
    reads, writes = (DTYPES[places[span.group].dtype] for places in (crossing.sources, crossing.destinations))
    for there, staged in layers:
        cast_runs(staged, reads, there, writes, found)


def _layers(pool: Pool, crossing: Crossing, span: Span, slot: Tensor) -> list[tuple[int, int]]:
    """Of each layer the address in the pool and in the slot."""
    length = crossing.bytes(span) // len(span.layers)
    places = (slot.data_ptr() + i * length for i in range(len(span.layers)))
    return [(pool.address + pool.geometry.offsets[layer], place) for layer, place in zip(span.layers, places, strict=True)]


def checksum(slot: Tensor, length: int) -> int:
    """Of the first `length` bytes of `slot` (uint8, a multiple of `ROW` long): CRC-32 over the sums of all rows and all columns of its
    table of 64-bit words.

    A word that changes changes a row and a column, so does one that moves. Twice a sum runs at 28 GB/s on one core here (numpy adds up
    columns twice as fast as torch, torch rows), CRC-32 over everything at 0.3.
    """
    table = _table(slot, length)
    return zlib.crc32(table.sum(1).numpy().data, zlib.crc32(table.numpy().sum(0).data))


def sums(slot: Tensor, length: int) -> Tensor:
    """What `checksum` is over, on any device: int64, those of the columns before those of the rows."""
    table = _table(slot, length)
    return torch.cat([table.sum(0), table.sum(1)])


def checksum_from(found: Tensor) -> int:
    """`checksum` from `sums`, which must have come to the host."""
    return zlib.crc32(found.numpy().data)


def _table(slot: Tensor, length: int) -> Tensor:
    """The first `length` bytes and zeros, as 64-bit words, a row of the table a `ROW`."""
    whole = -(-length // ROW) * ROW
    slot[length:whole] = 0
    return slot[:whole].view(torch.int64).view(-1, WORDS)
