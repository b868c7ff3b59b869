"""From the qkv product to queries that can attend: norms of queries and keys, rotation, keys and values into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .kv_store import store_kv
from .native import native_for, threads_for
from .rms_norm import rms_norm
from .rotary import rotate
from .triton_kernels import triton_for

LARGEST_HEAD = 1024

Angles = tuple[Tensor, Tensor]
"""Cosine and sine, of `rotary_angles`."""


def rotary_store(
    qkv: Tensor, cache: Tensor, rows: Tensor, *, heads: int, qk_norm: Tensor | None, angles: Angles | None, eps: float
) -> Tensor:
    """Normed and rotated queries [tokens, heads, head_dim]; keys, likewise, and values are stored in `rows` of `cache` (`store_kv`).

    qkv: [tokens, (heads + 2 * kv_heads) * head_dim], contiguous; qk_norm: fp32 [heads + kv_heads, head_dim]. The cache is of qkv's dtype,
    or int8.
    """
    tokens, (_, kv_heads, _, block_size, _) = qkv.shape[0], cache.shape
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    if cache.dtype is qkv.dtype and head_dim % 2 == 0 and (on_gpu := triton_for(qkv)) is not None:
        queries = qkv.new_empty(tokens, heads, head_dim)
        on_gpu.rotary_store(queries, cache, qkv, rows, qk_norm, angles, eps)
        return queries
    if cache.dtype not in (qkv.dtype, torch.int8) or head_dim > LARGEST_HEAD or (kernels := native_for(qkv)) is None:
        return rotary_store_torch(qkv, cache, rows, heads=heads, qk_norm=qk_norm, angles=angles, eps=eps)
    queries = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype)
    kernels.rotary_store(
        queries.data_ptr(),
        cache.data_ptr(),
        qkv.data_ptr(),
        qkv.stride(0),
        None if qk_norm is None else qk_norm.data_ptr(),
        None if angles is None else angles[0].data_ptr(),
        None if angles is None else angles[1].data_ptr(),
        rows.data_ptr(),
        tokens,
        heads,
        kv_heads,
        head_dim,
        block_size,
        eps,
        cache.dtype is torch.int8,
        threads_for(tokens * qkv.shape[1]),
    )
    return queries


def rotary_store_torch(
    qkv: Tensor, cache: Tensor, rows: Tensor, *, heads: int, qk_norm: Tensor | None, angles: Angles | None, eps: float
) -> Tensor:
    """The same by torch."""
    kv_heads = cache.shape[1]
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if qk_norm is not None:
        qk = rms_norm(qk, qk_norm, eps)
    if angles is not None:
        qk = rotate(qk, *angles)
    store_kv(cache, qk[:, heads:], values, rows)
    return qk[:, :heads]
