"""Storing new keys and values in the paged cache.

A layer's cache is [num_blocks, kv_heads, 2, block_size, head_dim]; read as rows of head_dim elements, token t of a block is
row ((block * kv_heads + head) * 2 + is_value) * block_size + t.
"""

from __future__ import annotations

import torch
from torch import Tensor


def store_rows(blocks: Tensor, offsets: Tensor, *, kv_heads: int, block_size: int) -> Tensor:
    """The key row of each (token, head) in a cache read as rows: int64 [tokens * kv_heads].

    blocks, offsets: int64 [tokens], the block that holds each token and its place there.
    """
    heads = blocks[:, None] * kv_heads + torch.arange(kv_heads)
    return (heads * (2 * block_size) + offsets[:, None]).flatten()


def store_kv(cache: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """Write keys and values, [tokens, kv_heads, head_dim] each, to `rows` (of `store_rows`) of one layer's cache, in place."""
    head_dim, block_size = cache.shape[4], cache.shape[3]
    lines = cache.view(-1, head_dim)
    lines.index_copy_(0, rows, keys.reshape(-1, head_dim))
    lines.index_copy_(0, rows + block_size, values.reshape(-1, head_dim))
