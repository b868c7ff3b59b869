"""Norms of queries and keys, rotation, keys and values into the paged cache, on a GPU: one pass, in which every element of the qkv product
is read once and written once. The twin is `rotary_store_torch`, and it rounds where this does."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS_AT_ONCE = 8


@triton.jit
def _rotary_store(
    queries_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    qkv_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    row_ptr: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    HALF_PADDED: tl.constexpr,
) -> None:
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE))[:, None]
    place = tl.arange(0, HALF_PADDED)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (place < HALF)
    is_value = head >= HEADS + KV_HEADS
    at = head * HEAD_DIM + place

    left_in = tl.load(qkv_ptr + token * qkv_stride + at, mask=inside, other=0.0)
    right_in = tl.load(qkv_ptr + token * qkv_stride + at + HALF, mask=inside, other=0.0)
    left, right = left_in.to(tl.float32), right_in.to(tl.float32)
    if NORMED:
        weighed = inside & (head < HEADS + KV_HEADS)
        squares = tl.sum(left * left + right * right, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        left_weight = tl.load(norm_ptr + at, mask=weighed, other=0.0)
        right_weight = tl.load(norm_ptr + at + HALF, mask=weighed, other=0.0)
        left = (left * scale * left_weight).to(left_in.dtype).to(tl.float32)
        right = (right * scale * right_weight).to(left_in.dtype).to(tl.float32)
    if TURNED:
        cos = tl.load(cos_ptr + token * HALF + place, mask=place < HALF, other=0.0)
        sin = tl.load(sin_ptr + token * HALF + place, mask=place < HALF, other=0.0)
        left, right = left * cos - right * sin, right * cos + left * sin
    new_left = tl.where(is_value, left_in, left.to(left_in.dtype))
    new_right = tl.where(is_value, right_in, right.to(left_in.dtype))

    is_query = head < HEADS
    queries_ptr += token * (HEADS * HEAD_DIM)
    tl.store(queries_ptr + at, new_left, mask=inside & is_query)
    tl.store(queries_ptr + at + HALF, new_right, mask=inside & is_query)
    kv_head = tl.where(is_value, head - KV_HEADS, head) - HEADS
    stored = inside & (head >= HEADS)
    row = tl.load(row_ptr + token * KV_HEADS + kv_head, mask=(head >= HEADS) & (head < HEADS + 2 * KV_HEADS), other=0)
    there = (row + tl.where(is_value, BLOCK_SIZE, 0)) * HEAD_DIM + place
    tl.store(cache_ptr + there, new_left, mask=stored)
    tl.store(cache_ptr + there + HALF, new_right, mask=stored)


def rotary_store(
    queries: Tensor, cache: Tensor, qkv: Tensor, rows: Tensor, qk_norm: Tensor | None, angles: tuple[Tensor, Tensor] | None, eps: float
) -> None:
    """As `kernels.rotary_store`; queries: [tokens, heads, head_dim]; head_dim even, the cache contiguous and of `qkv`'s dtype."""
    (tokens, heads, head_dim), (_, kv_heads, _, block_size, _) = queries.shape, cache.shape
    cos, sin = (rows, rows) if angles is None else angles  # not read without angles
    _rotary_store[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS_AT_ONCE))](
        queries,
        cache,
        qkv,
        qkv.stride(0),
        rows if qk_norm is None else qk_norm,
        cos,
        sin,
        rows,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        NORMED=qk_norm is not None,
        TURNED=angles is not None,
        HEADS_AT_ONCE=HEADS_AT_ONCE,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
    )
