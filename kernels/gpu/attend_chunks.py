"""Attention of rows with several new tokens each over the paged cache, on a GPU: cached prefix, causal, windows.

FlashAttention-2 (Dao, 2023) over a block table: a program has some queries of one row with all heads that share a KV head, and reads the
keys these may see once. Tiles of keys that all its queries see are not masked. The twin is `Chunk`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .softmax import scaled, softened
from .tiles import chunk_tile, gpu


@triton.jit
def _sweep(
    mixed: tl.tensor,
    total: tl.tensor,
    most: tl.tensor,
    query: tl.tensor,
    position: tl.tensor,
    cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    oldest: tl.tensor,
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
    """Adds the keys from `begin` to `end`, counted from position `start`, where the table begins. None is read that no query sees;
    `oldest` is the position of the first."""
    element = tl.arange(0, PADDED)[None, :]
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        read = element < HEAD_DIM
        if MASKED:
            near = key < end
            if WINDOW:
                near = near & (start + key > oldest - WINDOW)
            read = read & near[:, None]
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=near, other=0)
        else:
            block = tl.load(table_ptr + key // BLOCK_SIZE)
        here = (block * BLOCK + key % BLOCK_SIZE * HEAD_DIM)[:, None] + element
        keys = tl.load(cache_ptr + here, mask=read, other=0.0)
        values = tl.load(cache_ptr + here + BLOCK_SIZE * HEAD_DIM, mask=read, other=0.0)
        scores = scaled(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, softcap, SOFTCAP)
        if MASKED:
            there = (start + key)[None, :]
            seen = (there <= position[:, None]) & (key < end)[None, :]
            if WINDOW:
                seen = seen & (there > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        shares, fade, most = softened(scores, most)
        total = total * fade + tl.sum(shares, axis=1)
        mixed = tl.dot(shares.to(values.dtype), values, mixed * fade[:, None], input_precision="ieee")
    return mixed, total, most


@triton.jit(do_not_specialize=["rows", "table_width"])
def _attend_chunks(
    out_ptr: tl.tensor,
    query_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    place_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    position_ptr: tl.tensor,
    table_ptr: tl.tensor,
    rows: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_width: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCK: tl.constexpr = KV_HEADS * 2 * BLOCK_SIZE * HEAD_DIM
    # A row's later queries see more keys: the longest programs first.
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    # Row r's tiles begin with number sum[r] // QUERIES + r, so that the host need not know how many each has.
    row, behind = 0, rows
    while behind - row > 1:
        middle = (row + behind) // 2
        if tl.load(sum_ptr + middle) // QUERIES + middle <= tile:
            row = middle
        else:
            behind = middle
    before = tl.load(sum_ptr + row)
    length = (tl.load(sum_ptr + row + 1) - before).to(tl.int32)
    begin = (tile - (before // QUERIES).to(tl.int32) - row) * QUERIES
    if begin >= length:
        return

    member, element = tl.arange(0, ROWS), tl.arange(0, PADDED)
    query_at = begin + member // GROUP
    asked = ((member < QUERIES * GROUP) & (query_at < length))[:, None] & (element < HEAD_DIM)[None, :]
    token = tl.load(place_ptr + row) + query_at
    place = (token * HEADS + kv_head * GROUP + member % GROUP)[:, None] * HEAD_DIM + element[None, :]
    query = tl.load(query_ptr + place, mask=asked, other=0.0)

    chunk = tl.load(position_ptr + row).to(tl.int32)
    position = chunk + query_at
    newest, oldest = chunk + tl.minimum(begin + QUERIES, length) - 1, chunk + begin
    start, low, whole = 0, 0, 0
    if WINDOW:
        start = tl.maximum(chunk - WINDOW + 1, 0) // BLOCK_SIZE * BLOCK_SIZE
        low = (tl.maximum(oldest - WINDOW + 1, 0) - start) // KEYS * KEYS
        # tiles from here on have no key that the newest query no longer sees
        whole = (tl.maximum(newest - WINDOW + 1, 0) - start + KEYS - 1) // KEYS * KEYS
    end = newest + 1 - start
    edge = (oldest + 1 - start) // KEYS * KEYS  # tiles before it have no key that the oldest query does not see yet
    whole = tl.minimum(whole, edge)

    table_ptr += row * table_width
    cache_ptr += kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    if WINDOW:
        mixed, total, most = _sweep(
            mixed, total, most, query, position, cache_ptr, table_ptr, start, oldest, low, whole, scale, softcap,
            True, WINDOW, SOFTCAP, BLOCK, HEAD_DIM, BLOCK_SIZE, PADDED, KEYS,
        )  # fmt: skip
    mixed, total, most = _sweep(
        mixed, total, most, query, position, cache_ptr, table_ptr, start, oldest, whole, edge, scale, softcap,
        False, WINDOW, SOFTCAP, BLOCK, HEAD_DIM, BLOCK_SIZE, PADDED, KEYS,
    )  # fmt: skip
    mixed, total, most = _sweep(
        mixed, total, most, query, position, cache_ptr, table_ptr, start, oldest, edge, end, scale, softcap,
        True, WINDOW, SOFTCAP, BLOCK, HEAD_DIM, BLOCK_SIZE, PADDED, KEYS,
    )  # fmt: skip
    tl.store(out_ptr + place, mixed / total[:, None], mask=asked)


def attend_chunks(
    out: Tensor,
    query: Tensor,
    cache: Tensor,
    places: Tensor,
    sums: Tensor,
    positions: Tensor,
    tables: Tensor,
    tokens: int,
    window: int,
    scale: float,
    softcap: float,
) -> None:
    """Rows of query [tokens, heads, head_dim], contiguous, to the same rows of `out`; the others as in `PagedChunks`, cache as in `attend`.
    How it is launched follows from shapes and from how many new tokens all rows have together."""
    (_, heads, head_dim), (_, kv_heads, _, block_size, _), (rows, width) = query.shape, cache.shape, tables.shape
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    tile = chunk_tile(gpu(query.device), padded, query.dtype)
    members = max(tile.rows, triton.next_power_of_2(group))
    queries = members // group
    _attend_chunks[(tokens // queries + rows, kv_heads)](
        out,
        query,
        cache,
        places,
        sums,
        positions,
        tables,
        rows,
        scale,
        softcap,
        width,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        SOFTCAP=softcap > 0.0,
        QUERIES=queries,
        ROWS=members,
        PADDED=padded,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
