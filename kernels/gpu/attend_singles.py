"""Attention of rows with one new token each over the paged cache, on a GPU.

Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023): a program has one KV head of one row, with all query heads that share it, so that a key
is read once, and one split of the row's keys. What the splits found is joined by a second kernel. The twins are attend_singles.cpp and
`Singles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sweep import nothing, sweep
from .tiles import decode_tile, gpu, split_keys

JOINED = 16
"""Splits joined at once: with 64 of them, most of the time is waiting for four loads, not for 64."""


@triton.jit(do_not_specialize=["table_width", "split_keys"])
def _attend_split(
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    query_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    token_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first_ptr: tl.tensor,
    last_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_width: tl.tensor,
    split_keys: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCK: tl.constexpr = KV_HEADS * 2 * BLOCK_SIZE * HEAD_DIM
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.load(first_ptr + row)
    start = first // BLOCK_SIZE * BLOCK_SIZE  # positions are counted from here: the first key of the table
    low = (first - start).to(tl.int32)
    end = (tl.load(last_ptr + row) + 1 - start).to(tl.int32)
    begin = split * split_keys
    if SPLITS:
        end = tl.minimum(end, begin + split_keys)
        if begin >= end:
            return

    member, element = tl.arange(0, ROWS), tl.arange(0, PADDED)
    token = tl.load(token_ptr + row)
    place = (token * HEADS + kv_head * GROUP + member)[:, None] * HEAD_DIM + element[None, :]
    asked = (member < GROUP)[:, None] & (element < HEAD_DIM)[None, :]
    query = tl.load(query_ptr + place, mask=asked, other=0.0)
    table_ptr += row * table_width
    cache_ptr += kv_head * (2 * BLOCK_SIZE * HEAD_DIM)

    mixed, total, most = nothing(ROWS, PADDED)
    position = tl.zeros([ROWS], tl.int32) + end  # every key that is read is seen
    mixed, total, most = sweep(
        mixed, total, most, query, position, cache_ptr, table_ptr, low, begin, end, scale, softcap,
        True, 0, SOFTCAP, BLOCK, HEAD_DIM, BLOCK_SIZE, PADDED, KEYS,
    )  # fmt: skip
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees nothing, which fills a captured batch, is zeros
    if SPLITS:
        number = row * tl.num_programs(1) + split
        there = (number * HEADS + kv_head * GROUP + member)[:, None] * HEAD_DIM + element[None, :]
        tl.store(part_ptr + there, mixed, mask=asked)
        tl.store(weight_ptr + number * HEADS + kv_head * GROUP + member, most + tl.log2(total), mask=member < GROUP)
    else:
        tl.store(out_ptr + place, mixed, mask=asked)


@triton.jit(do_not_specialize=["split_keys", "splits"])
def _join_splits(
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    token_ptr: tl.tensor,
    first_ptr: tl.tensor,
    last_ptr: tl.tensor,
    split_keys: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(first_ptr + row)
    count = tl.load(last_ptr + row) + 1 - first // BLOCK_SIZE * BLOCK_SIZE
    used = tl.minimum(splits, (count + split_keys - 1) // split_keys).to(tl.int32)
    element = tl.arange(0, PADDED)
    inside = element < HEAD_DIM
    most = float("-inf")
    total = 0.0
    mixed = tl.zeros([PADDED], tl.float32)
    for at in range(0, used, AT_ONCE):
        split = at + tl.arange(0, AT_ONCE)
        number = (row * splits + split) * HEADS + head
        weights = tl.load(weight_ptr + number, mask=split < used, other=float("-inf"))
        read = (split < used)[:, None] & inside[None, :]
        parts = tl.load(part_ptr + number[:, None] * HEAD_DIM + element[None, :], mask=read, other=0.0)
        new_most = tl.maximum(most, tl.max(weights, axis=0))
        level = tl.where(new_most == float("-inf"), 0.0, new_most)
        fade, shares = tl.exp2(most - level), tl.exp2(weights - level)
        mixed = mixed * fade + tl.sum(shares[:, None] * parts, axis=0)
        total = total * fade + tl.sum(shares, axis=0)
        most = new_most
    place = (tl.load(token_ptr + row) * HEADS + head) * HEAD_DIM + element
    tl.store(out_ptr + place, mixed / tl.where(total == 0.0, 1.0, total), mask=inside)


def attend_singles(
    out: Tensor, query: Tensor, cache: Tensor, tokens: Tensor, tables: Tensor, firsts: Tensor, lasts: Tensor, scale: float, softcap: float
) -> None:
    """Rows `tokens` of query [tokens, heads, head_dim], contiguous, to the same rows of `out`; the others as in `PagedSingles`, cache as in
    `attend`. How it is launched follows from shapes. A row whose last position is before its first sees nothing: zeros."""
    (_, heads, head_dim), (_, kv_heads, _, block_size, _), (rows, width) = query.shape, cache.shape, tables.shape
    device, padded = gpu(query.device), max(16, triton.next_power_of_2(head_dim))
    tile = decode_tile(device, padded, query.dtype)
    size = split_keys(rows, kv_heads, width * block_size, device.cores)
    splits = -(-width * block_size // size)
    part, weight = out, out
    if splits > 1:
        part = torch.empty(rows, splits, heads, head_dim, dtype=torch.float32, device=out.device)
        weight = torch.empty(rows, splits, heads, dtype=torch.float32, device=out.device)
    _attend_split[(kv_heads, splits, rows)](
        out,
        part,
        weight,
        query,
        cache,
        tokens,
        tables,
        firsts,
        lasts,
        scale,
        softcap,
        width,
        size,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SOFTCAP=softcap > 0.0,
        SPLITS=splits > 1,
        ROWS=max(tile.rows, triton.next_power_of_2(heads // kv_heads)),
        PADDED=padded,
        KEYS=max(tile.keys, block_size),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _join_splits[(heads, rows)](
            out,
            part,
            weight,
            tokens,
            firsts,
            lasts,
            size,
            splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            PADDED=padded,
            AT_ONCE=JOINED,
        )
