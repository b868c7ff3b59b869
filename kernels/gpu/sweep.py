"""The loop of both attention kernels: keys and values of a paged cache, tile after tile, softmax in fp32 and in powers of two.

Positions are counted from that of the table's first key.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(products: tl.tensor, scale: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """The scores of products q·k, as exponents of 2; soft-capped if SOFTCAP."""
    if SOFTCAP:
        x = products * (scale / softcap)
        # tanh(x), and it holds far out: e to the 2x may be infinite or nothing
        return softcap * LOG2_E * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E))))
    return products * (scale * LOG2_E)


@triton.jit
def _softened(scores: tl.tensor, most: tl.tensor) -> tl.tensor:
    """For a tile of scores [rows, keys] and the most of each row so far: its share of the softmax, not yet divided by the sum, the factor
    for what was summed before, and the new most. A row that has seen no key yet has -inf, and nothing to divide."""
    new_most = tl.maximum(most, tl.max(scores, axis=1))
    level = tl.where(new_most == float("-inf"), 0.0, new_most)
    return tl.exp2(scores - level[:, None]), tl.exp2(most - level), new_most


@triton.jit
def nothing(ROWS: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """What is found before any key: `mixed`, `total`, `most` of `sweep`."""
    zeros = tl.zeros([ROWS], tl.float32)
    return tl.zeros([ROWS, PADDED], tl.float32), zeros, zeros + float("-inf")


@triton.jit
def sweep(
    mixed: tl.tensor,
    total: tl.tensor,
    most: tl.tensor,
    query: tl.tensor,
    position: tl.tensor,
    cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    low: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """Adds the keys from `begin` to `end` to what is found so far: `mixed` [rows, PADDED], to be divided by `total` [rows]; `most` [rows].

    MASKED: who sees what depends on `position` [rows] and WINDOW, and nothing before `low` is read; else every row sees every key.
    """
    element = tl.arange(0, PADDED)[None, :]
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        read = element < HEAD_DIM
        if MASKED:
            near = (key >= low) & (key < end)
            read = read & near[:, None]
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=near, other=0)
        else:
            block = tl.load(table_ptr + key // BLOCK_SIZE)
        here = (block * BLOCK + key % BLOCK_SIZE * HEAD_DIM)[:, None] + element
        keys = tl.load(cache_ptr + here, mask=read, other=0.0)
        values = tl.load(cache_ptr + here + BLOCK_SIZE * HEAD_DIM, mask=read, other=0.0)
        scores = _scaled(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, softcap, SOFTCAP)
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & near[None, :]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        shares, fade, most = _softened(scores, most)
        total = total * fade + tl.sum(shares, axis=1)
        mixed = tl.dot(shares.to(values.dtype), values, mixed * fade[:, None], input_precision="ieee")
    return mixed, total, most
