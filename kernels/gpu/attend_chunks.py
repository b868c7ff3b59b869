"""Attention of rows with several new tokens each over the paged cache, on a GPU: cached prefix, causal, windows.

FlashAttention-2 (Dao, 2023) over a block table: a program has some queries of one row with all heads that share a KV head, and reads the
keys these may see once. Tiles of keys that all its queries see are not masked. The twin is `Chunk`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sweep import nothing, sweep
from .tiles import chunk_tile, gpu


@triton.jit
def _row_of(tile: tl.tensor, sum_ptr: tl.tensor, rows: tl.tensor, QUERIES: tl.constexpr) -> tl.tensor:
    """The row that has tile number `tile`. Row r's begin with sum[r] // QUERIES + r, so that the host need not know how many each has."""
    row, behind = 0, rows
    while behind - row > 1:
        middle = (row + behind) // 2
        if tl.load(sum_ptr + middle) // QUERIES + middle <= tile:
            row = middle
        else:
            behind = middle
    return row


@triton.jit
def _bounds(oldest: tl.tensor, newest: tl.tensor, WINDOW: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """The first key that the oldest query sees; from which tile on the newest still sees all, and up to which the oldest sees all."""
    edge = (oldest + 1) // KEYS * KEYS
    low, whole = edge * 0, edge * 0
    if WINDOW:
        low = tl.maximum(oldest - WINDOW + 1, 0)
        whole = tl.minimum((tl.maximum(newest - WINDOW + 1, 0) + KEYS - 1) // KEYS * KEYS, edge)
    return low, whole, edge


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
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # a row's later queries see more keys: the longest first
    row = _row_of(tile, sum_ptr, rows, QUERIES)
    before = tl.load(sum_ptr + row)
    length = (tl.load(sum_ptr + row + 1) - before).to(tl.int32)
    begin = (tile - (before // QUERIES).to(tl.int32) - row) * QUERIES
    if begin >= length:
        return
    member, element = tl.arange(0, ROWS), tl.arange(0, PADDED)
    query_at = begin + member // GROUP
    asked = ((member < QUERIES * GROUP) & (query_at < length))[:, None] & (element < HEAD_DIM)[None, :]
    head = (tl.load(place_ptr + row) + query_at) * HEADS + kv_head * GROUP + member % GROUP
    place = head[:, None] * HEAD_DIM + element[None, :]
    query = tl.load(query_ptr + place, mask=asked, other=0.0)
    chunk = tl.load(position_ptr + row).to(tl.int32)
    if WINDOW:
        chunk -= tl.maximum(chunk - WINDOW + 1, 0) // BLOCK_SIZE * BLOCK_SIZE  # from here on counted from the table's first key
    position, newest = chunk + query_at, chunk + tl.minimum(begin + QUERIES, length) - 1
    low, whole, edge = _bounds(chunk + begin, newest, WINDOW, KEYS)
    table_ptr, cache_ptr = table_ptr + row * table_width, cache_ptr + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    mixed, total, most = nothing(ROWS, PADDED)
    if WINDOW:
        mixed, total, most = sweep(
            mixed, total, most, query, position, cache_ptr, table_ptr, low, low // KEYS * KEYS, whole, scale, softcap,
            True, WINDOW, SOFTCAP, BLOCK, HEAD_DIM, BLOCK_SIZE, PADDED, KEYS,
        )  # fmt: skip
    mixed, total, most = sweep(
        mixed, total, most, query, position, cache_ptr, table_ptr, low, whole, edge, scale, softcap,
        False, WINDOW, SOFTCAP, BLOCK, HEAD_DIM, BLOCK_SIZE, PADDED, KEYS,
    )  # fmt: skip
    mixed, total, most = sweep(
        mixed, total, most, query, position, cache_ptr, table_ptr, low, edge, newest + 1, scale, softcap,
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
