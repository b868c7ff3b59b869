"""Copying whole blocks of a cache: keys and values of all heads."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Block `destinations[i]` of one layer's cache becomes what block `sources[i]` was before the call, in place.

    cache: [num_blocks, kv_heads, 2, block_size, head_dim]; sources, destinations: int64 [copies], the destinations distinct.
    """
    cache.index_copy_(0, destinations, cache.index_select(0, sources))
