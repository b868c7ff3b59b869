"""A piece as one run of bytes: what a staging slot holds and what crosses a two-sided transport.

Layer after layer, block after block of the source's block size, in the source's dtype: of a block's heads and tokens those that cross, as
[heads, 2, tokens, head_dim]. Both ends compute the order from the span and the route; the destination casts.
"""

from __future__ import annotations

import zlib

from torch import Tensor

from ..kernels.copy_summed import copy_summed, table_sums
from .casting import cast_runs
from .coverage import Span
from .crossing import Crossing
from .pool import Pool


def pack(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: Tensor) -> int:
    """Copy `span`, which lies in `blocks` of the source's `pool`, to the beginning of `slot` (uint8); its checksum."""
    piece = _layers(pool, crossing, span, slot), crossing.packed(span, blocks)
    return checksum(copy_summed(piece, slot, crossing.bytes(span), packed=True))


def unpack(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: Tensor, expected: int) -> bool:
    """The inverse of `pack`: the beginning of `slot` into `blocks` of the destination's `pool`. Whether its checksum is the one expected;
    else the blocks may hold anything. Raises `OverflowError` if it is cast and does not fit."""
    length, found, layers = crossing.bytes(span), crossing.unpacked(span, blocks), _layers(pool, crossing, span, slot)
    if not crossing.casts(span.group):
        piece = [(staged, there) for there, staged in layers], found
        return checksum(copy_summed(piece, slot, length, packed=False)) == expected
    if checksum(table_sums(slot, length)) != expected:
        return False
    reads, writes = crossing.sources[span.group], crossing.destinations[span.group]
    for there, staged in layers:
        cast_runs(staged, reads, there, writes, found)
    return True


def _layers(pool: Pool, crossing: Crossing, span: Span, slot: Tensor) -> list[tuple[int, int]]:
    """Of each layer the address in the pool and in the slot."""
    length = crossing.bytes(span) // len(span.layers)
    places = (slot.data_ptr() + i * length for i in range(len(span.layers)))
    return [(pool.address + pool.geometry.offsets[layer], place) for layer, place in zip(span.layers, places, strict=True)]


def name_of(transfer_id: str, seq: int) -> int:
    """By which a piece differs from one that was in its slot before it: 32 bits, for its seal."""
    return zlib.crc32(f"{transfer_id} {seq}".encode())


def checksum(sums: Tensor) -> int:
    """Of a piece: CRC-32 of its `table_sums`, which must have come to the host. CRC-32 of all its bytes would take ten times as long as
    copying them."""
    return zlib.crc32(sums.numpy().data)
