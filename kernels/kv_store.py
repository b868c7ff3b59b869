"""Storing new keys and values in the paged cache.

A layer's cache is [num_blocks, kv_heads, 2, block_size, width]; read as rows of `width` elements, token t of a block is
row ((block * kv_heads + head) * 2 + is_value) * block_size + t. `width` is head_dim, and in an int8 cache more (int8_rows.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int8_rows import encode


def store_rows(blocks: Tensor, offsets: Tensor, *, kv_heads: int, block_size: int) -> Tensor:
    """The key row of each (token, head) in a cache read as rows: int64 [tokens * kv_heads].

    blocks, offsets: int64 [tokens], the block that holds each token and its place there.
    """
    heads = blocks[:, None] * kv_heads + torch.arange(kv_heads)
    return (heads * (2 * block_size) + offsets[:, None]).flatten()


def store_kv(cache: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """Write keys and values, [tokens, kv_heads, head_dim] each, to `rows` (of `store_rows`) of one layer's cache, in place. The cache is of
    their dtype, or int8."""
    block_size, width = cache.shape[3:]
    lines = cache.view(-1, width)
    for each, places in ((keys, rows), (values, rows + block_size)):
        held = encode(each) if cache.dtype is torch.int8 else each
        lines.index_copy_(0, places, held.reshape(-1, width))
