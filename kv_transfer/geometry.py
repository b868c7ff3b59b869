"""Where the bytes of a pool lie, so that two processes with equal layouts find the same KV at the same place.

header   nonce (16 bytes), then one 64-bit epoch word per slot; padded to a page
layers   in the order of the cache groups; each [num_blocks, kv_heads, 2, block_size, width], padded to a page
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ..core.layout import Layout

SLOTS = 4096
"""Epoch words, so transfers at once per source. 32 KiB, and more than a pool of 64 Ki tokens has blocks."""
NONCE_BYTES = 16
WORD_BYTES = 8
PAGE = 4096
Runs = list[tuple[int, int, int]]
"""What is copied: offset at the source, offset at the destination, length."""
Table: TypeAlias = "array[int]"
"""The same as 64-bit numbers in a row, three a run, for code that takes an address."""


def runs_in(table: Table) -> Iterator[tuple[int, int, int]]:
    return zip(table[::3], table[1::3], table[2::3], strict=True)


def padded(size: int) -> int:
    """Up to a page's end."""
    return -(-size // PAGE) * PAGE


HEADER_BYTES = padded(NONCE_BYTES + SLOTS * WORD_BYTES)


class Geometry:
    """Byte offsets in the pool of a worker with `layout`. `offsets[layer]` is where the layer's block 0 begins."""

    def __init__(self, layout: Layout) -> None:
        self.offsets: dict[int, int] = {}
        end = HEADER_BYTES
        for group, blocks in zip(layout.groups, layout.num_blocks, strict=True):
            for layer in group.layers:
                self.offsets[layer] = end
                end += padded(blocks * layout.block_size * group.token_bytes)
        self.size = end


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where one end has a piece: block `numbers[0]` holds its first position. A block is [kv_heads, 2, size, head_dim], and the
    piece's first KV head is its head `first_head`."""

    numbers: Sequence[int]
    size: int
    kv_heads: int
    first_head: int = 0


def runs_between(source: Blocks, destination: Blocks, heads: int, start: int, stop: int, row: int) -> Runs:
    """How to copy positions [start, stop) of `heads` KV heads of one layer: `(source offset, destination offset, length)` from each
    end's block 0. `row` is the length of one head's K of one token: in bytes, or in elements if the ends differ in dtype.

    Where a whole block becomes a whole block its heads are one run, and one with its neighbour's if they are neighbours at both ends. Of a
    block covered in part only those tokens' rows are copied: K and V of each head are a run of their own. Takes 0.3 µs a block.
    """
    plane, plane_there = source.size * row, destination.size * row
    block, block_there = 2 * source.kv_heads * plane, 2 * destination.kv_heads * plane_there
    head, head_there = 2 * source.first_head * plane, 2 * destination.first_head * plane_there
    first, first_there = start // source.size, start // destination.size
    edges = {start, stop, *range((first + 1) * source.size, stop, source.size)}
    edges.update(range((first_there + 1) * destination.size, stop, destination.size))
    found: Runs = []
    for low, high in pairwise(sorted(edges)):
        here = source.numbers[low // source.size - first] * block + head
        there = destination.numbers[low // destination.size - first_there] * block_there + head_there
        if not high - low == source.size == destination.size:
            here, there = here + low % source.size * row, there + low % destination.size * row
            found += [(here + number * plane, there + number * plane_there, (high - low) * row) for number in range(2 * heads)]
            continue
        length = 2 * heads * plane
        if found:
            last_from, last_to, last_length = found[-1]
            if last_from + last_length == here and last_to + last_length == there:
                found[-1] = (last_from, last_to, last_length + length)
                continue
        found.append((here, there, length))
    return found


def runs_unpacked(size: int, destination: Blocks, heads: int, start: int, stop: int, row: int) -> Runs:
    """As `runs_between`, from a packed piece: for each block of `size`, in order, those of its positions that are in the piece, as
    [heads, 2, positions, head_dim]."""
    plane_there = destination.size * row
    block_there, head_there = 2 * destination.kv_heads * plane_there, 2 * destination.first_head * plane_there
    first_there = start // destination.size
    found: Runs = []
    here = 0
    for low, high in pairwise([start, *range((start // size + 1) * size, stop, size), stop]):
        plane = (high - low) * row
        edges = [low, *range((low // destination.size + 1) * destination.size, high, destination.size), high]
        for begin, end in pairwise(edges):
            there = destination.numbers[begin // destination.size - first_there] * block_there + head_there
            if end - begin == high - low == destination.size:
                found.append((here, there, 2 * heads * plane))
                continue
            at, at_there, length = here + (begin - low) * row, there + begin % destination.size * row, (end - begin) * row
            found += [(at + number * plane, at_there + number * plane_there, length) for number in range(2 * heads)]
        here += 2 * heads * plane
    return found
