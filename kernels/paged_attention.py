"""Attention over a paged cache.

Rows of a step that have the same number of queries and about as much context are computed together as one `Span`: their
blocks are gathered into contiguous keys and values, padded to the longest, and what a query may not see is masked. Everything
that depends on tables and positions is computed once per step and cache group, and shared by the layers of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """`rows` sequences with `queries` new tokens each.

    tokens: int64 [rows * queries], their places among the step's tokens. blocks: int64 [rows * kv_heads * 2 * blocks],
    which blocks' keys and values are read, as rows of a cache read as [-1, block_size * head_dim].
    mask: [rows * kv_heads, 1, queries, keys], 0 where a query sees a key and -inf where it does not, in the model's dtype.
    """

    rows: int
    queries: int
    tokens: Tensor
    blocks: Tensor
    mask: Tensor


def make_span(
    tokens: Sequence[int],
    starts: Sequence[int],
    queries: int,
    tables: Sequence[Sequence[int]],
    *,
    window: int,
    kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
) -> Span:
    """The span of rows whose first new token is at place `tokens[r]` of the step and at position `starts[r]` of its sequence.

    `tables[r]` are the blocks of the whole sequence; only those with a position that a query sees are read. `window` 0 is
    full attention, w lets query q see keys k with q - w < k <= q.
    """
    rows = len(starts)
    firsts = [max(0, start - window + 1) // block_size if window else 0 for start in starts]
    lasts = [(start + queries - 1) // block_size + 1 for start in starts]
    width = max(last - first for first, last in zip(firsts, lasts, strict=True))
    blocks = np.empty((rows, width), dtype=np.int64)
    for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        blocks[row, : last - first] = tables[row][first:last]
        # Padding repeats a block of the row itself: masked, and never another sequence's memory.
        blocks[row, last - first :] = tables[row][last - 1]
    heads = blocks[:, None, :] * kv_heads + np.arange(kv_heads)[:, None]
    index = heads[:, :, None, :] * 2 + np.arange(2)[:, None]
    start = np.asarray(starts)
    query = start[:, None] + np.arange(queries)
    key = np.asarray(firsts)[:, None] * block_size + np.arange(width * block_size)
    seen = key[:, None, :] <= query[:, :, None]
    if window:
        seen &= key[:, None, :] > query[:, :, None] - window
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen), -torch.inf)
    place = np.asarray(tokens)[:, None] + np.arange(queries)
    return Span(
        rows=rows,
        queries=queries,
        tokens=torch.from_numpy(place.ravel()),
        blocks=torch.from_numpy(index.ravel()),
        mask=mask.repeat_interleave(kv_heads, dim=0)[:, None],
    )


def attend(query: Tensor, cache: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
    """Attention of the step's queries over one layer's cache: [tokens, heads * head_dim], in `query`'s dtype.

    query: [tokens, heads, head_dim]; cache: [num_blocks, kv_heads, 2, block_size, head_dim]. The queries' own keys and values
    are already stored. Softmax is over `scale * q·k`.
    """
    tokens, heads, head_dim = query.shape
    if len(spans) == 1 and spans[0].rows == 1:
        return _attend_span(query, cache, spans[0], scale).view(tokens, heads * head_dim)
    out = torch.empty_like(query)
    for span in spans:
        out.index_copy_(0, span.tokens, _attend_span(query.index_select(0, span.tokens), cache, span, scale))
    return out.view(tokens, heads * head_dim)


def _attend_span(query: Tensor, cache: Tensor, span: Span, scale: float) -> Tensor:
    """Queries [rows * queries, heads, head_dim] of one span, in and out."""
    _, kv_heads, _, block_size, head_dim = cache.shape
    group = query.shape[1] // kv_heads
    batch = span.rows * kv_heads
    read = cache.view(-1, block_size * head_dim).index_select(0, span.blocks).view(batch, 1, 2, -1, head_dim)
    keys, values = read[:, :, 0], read[:, :, 1]
    if span.queries == 1:
        # The heads that share keys become the queries of one head, so that keys are read once.
        shared = query.view(batch, 1, group, head_dim)
        return F.scaled_dot_product_attention(shared, keys, values, attn_mask=span.mask, scale=scale).reshape(query.shape)
    split = query.view(span.rows, span.queries, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    split = split.reshape(batch, group, span.queries, head_dim)
    wide = (batch, group, -1, head_dim)
    mixed = F.scaled_dot_product_attention(split, keys.expand(wide), values.expand(wide), attn_mask=span.mask, scale=scale)
    mixed = mixed.view(span.rows, kv_heads, group, span.queries, head_dim).permute(0, 3, 1, 2, 4)
    return mixed.reshape(query.shape)
