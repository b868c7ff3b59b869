"""Where the bytes of a pool lie, so that two processes with equal layouts find the same KV at the same place.

header   nonce (16 bytes), then one 64-bit epoch word per slot; padded to a page
layers   in the order of the cache groups; each [num_blocks, kv_heads, 2, block_size, head_dim], padded to a page
"""

from __future__ import annotations

from collections.abc import Iterator

from ..core.layout import CacheGroup, Layout

SLOTS = 4096
"""Epoch words, so transfers at once per source. 32 KiB, and more than a pool of 64 Ki tokens has blocks."""
NONCE_BYTES = 16
WORD_BYTES = 8
PAGE = 4096


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Geometry:
    """Byte offsets in the pool of a worker with `layout`. `offsets[layer]` is where the layer's block 0 begins."""

    def __init__(self, layout: Layout) -> None:
        self.offsets: dict[int, int] = {}
        end = _paged(NONCE_BYTES + SLOTS * WORD_BYTES)
        for group, blocks in zip(layout.groups, layout.num_blocks, strict=True):
            for layer in group.layers:
                self.offsets[layer] = end
                end += _paged(blocks * layout.block_size * group.token_bytes)
        self.size = end


def runs(
    group: CacheGroup, block_size: int, start: int, stop: int, source: tuple[int, ...], destination: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """How to copy positions [start, stop) of one layer: `(source offset, destination offset, length)` in bytes from each side's
    block 0. `source[0]` and `destination[0]` hold position `start`.

    Whole blocks that are neighbours on both sides make one run. Of a block covered in part only those tokens' rows are
    copied: K and V of each head are a run of their own.
    """
    block_bytes = block_size * group.token_bytes
    found: list[tuple[int, int, int]] = []
    first = start // block_size
    for index, (here, there) in enumerate(zip(source, destination, strict=True), first):
        low, high = max(start - index * block_size, 0), min(stop - index * block_size, block_size)
        if high - low < block_size:
            found.extend(_rows(group, block_size, low, high, here * block_bytes, there * block_bytes))
            continue
        if found:
            last_from, last_to, length = found[-1]
            if last_from + length == here * block_bytes and last_to + length == there * block_bytes:
                found[-1] = (last_from, last_to, length + block_bytes)
                continue
        found.append((here * block_bytes, there * block_bytes, block_bytes))
    return found


def _rows(group: CacheGroup, block_size: int, low: int, high: int, source: int, destination: int) -> Iterator[tuple[int, int, int]]:
    """Tokens [low, high) of one block, whose bytes begin at `source` and `destination`."""
    row = group.head_dim * group.dtype.itemsize
    for plane in range(2 * group.kv_heads):
        at = (plane * block_size + low) * row
        yield source + at, destination + at, (high - low) * row
