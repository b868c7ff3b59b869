"""Attention over a paged cache.

Everything that depends on tables and positions is computed once per step and cache group, and shared by the layers of the
group: which blocks to gather into contiguous keys and values, and who may see what. A row with several new tokens is a `Chunk`
and computed alone, tile by tile; rows with one new token that have about as much context are computed together as `Singles`, padded to
the longest. Where there are kernels (C++ in bf16, Triton's on a GPU) nothing is gathered: all rows with several new tokens are one
`PagedChunks`, all with one are `PagedSingles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .attend_chunks import PagedChunks, attend_chunks
from .attend_singles import PagedSingles, attend_singles
from .int8_rows import read_blocks
from .paging import Paging
from .softcap import softcap_
from .triton_kernels import TritonKernels, triton_for

TILE = 128
"""Queries of a chunk computed at once: a tile reads no key that all its queries are forbidden to see."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of a chunk and the gathered keys they may see. mask: fp32 [queries, keys], 0 or -inf."""

    queries: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row's new tokens, a slice of the step's. blocks: int64, rows of the cache read as [-1, block_size * width]."""

    tokens: slice
    blocks: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Singles:
    """Rows with one new token each. tokens: int64 [rows]; blocks as in `Chunk`; mask: [rows * kv_heads, 1, 1, keys]."""

    tokens: Tensor
    blocks: Tensor
    mask: Tensor


Gathered = Chunk | Singles
Paged = PagedChunks | PagedSingles
Span = Gathered | Paged


def make_chunk(token: int, start: int, length: int, table: Sequence[int], paging: Paging) -> Chunk:
    """A row whose `length` new tokens begin at place `token` of the step and at position `start` of its sequence."""
    size = paging.block_size
    first, last = paging.first_block(start), (start + length - 1) // size + 1
    tiles = []
    for begin in range(0, length, TILE):
        end = min(begin + TILE, length)
        low = (paging.first_block(start + begin) - first) * size
        high = start + end - first * size
        keys = np.arange(first * size + low, first * size + high)
        seen = paging.sees(np.arange(start + begin, start + end)[:, None], keys)
        tiles.append(Tile(slice(begin, end), slice(low, high), _mask(seen, torch.float32)))
    blocks = np.asarray(table[first:last], dtype=np.int64)[None]
    return Chunk(slice(token, token + length), _cache_rows(blocks, paging.kv_heads), tuple(tiles))


def make_singles(
    tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], paging: Paging, dtype: torch.dtype
) -> Singles:
    """Rows whose one new token is at place `tokens[r]` of the step and at `positions[r]` of its sequence. dtype: the model's."""
    size = paging.block_size
    firsts = [paging.first_block(position) for position in positions]
    counts = [position // size + 1 - first for position, first in zip(positions, firsts, strict=True)]
    blocks = np.empty((len(tokens), max(counts)), dtype=np.int64)
    for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        blocks[row, :count] = tables[row][first : first + count]
        # Padding repeats a block of the row itself: masked, and never another sequence's memory.
        blocks[row, count:] = blocks[row, 0]
    keys = np.asarray(firsts)[:, None] * size + np.arange(max(counts) * size)
    mask = _mask(paging.sees(np.asarray(positions)[:, None], keys), dtype)
    return Singles(
        tokens=torch.tensor(tokens),
        blocks=_cache_rows(blocks, paging.kv_heads),
        mask=mask.repeat_interleave(paging.kv_heads, dim=0)[:, None, None],
    )


def _cache_rows(blocks: NDArray[np.int64], kv_heads: int) -> Tensor:
    """For blocks [rows, n]: cache rows of [rows, kv_heads, 2, n], flat; the 2 are keys and values."""
    heads = blocks[:, None, :] * kv_heads + np.arange(kv_heads)[:, None]
    return torch.from_numpy((heads[:, :, None, :] * 2 + np.arange(2)[:, None]).ravel())


def _mask(seen: NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen), -torch.inf)


def attend(query: Tensor, cache: Tensor, spans: Sequence[Span], scale: float, softcap: float = 0.0) -> Tensor:
    """Attention of the step's queries over one layer's cache: [tokens, heads * head_dim], in `query`'s dtype.

    query: [tokens, heads, head_dim]; cache: [num_blocks, kv_heads, 2, block_size, head_dim] of its dtype, or int8 (int8_rows.py). The
    queries' own keys and values are already stored. Softmax is over `scale * q·k`, soft-capped (0 is no cap), in fp32.
    """
    if (kernels := triton_for(query)) is not None and not any(isinstance(span, Gathered) for span in spans):
        return _attend_paged(kernels, query.contiguous(), cache, spans, scale, softcap)
    if len(spans) == 1 and isinstance(spans[0], PagedSingles) and spans[0].tokens.shape[0] == query.shape[0]:
        return attend_singles(query.contiguous(), cache, spans[0], scale, softcap).flatten(1)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for span in spans:
        if isinstance(span, Chunk):
            _attend_chunk(query[span.tokens], cache, span, scale, softcap, out[span.tokens])
        elif isinstance(span, PagedChunks):
            attend_chunks(out, query.contiguous(), cache, span, scale, softcap)
        else:
            out.index_copy_(0, span.tokens, _attend_rows(query.index_select(0, span.tokens), cache, span, scale, softcap))
    return out.view(len(query), -1)


def _attend_paged(kernels: TritonKernels, query: Tensor, cache: Tensor, spans: Sequence[Span], scale: float, softcap: float) -> Tensor:
    out = torch.empty_like(query)
    for span in spans:
        if isinstance(span, PagedChunks):
            rows = (span.places, span.sums, span.positions, span.tables, span.tokens, span.window)
            kernels.attend_chunks(out, query, cache, *rows, scale, softcap)
        elif isinstance(span, PagedSingles):
            kernels.attend_singles(out, query, cache, span.tokens, span.tables, span.firsts, span.lasts, scale, softcap)
    return out.view(len(query), -1)


def _attend_chunk(query: Tensor, cache: Tensor, chunk: Chunk, scale: float, softcap: float, out: Tensor) -> None:
    """Queries [length, heads, head_dim] to `out`, likewise.

    Two matrix products and a softmax: in bf16 that takes a third of the time of torch's fused attention on the CPU (256
    queries: 1.05 ms against 3.3), in fp32 the same.
    """
    kv_heads, head_dim = cache.shape[1], query.shape[2]
    read = _read(cache, chunk.blocks, query.dtype).view(kv_heads, 2, -1, head_dim)
    keys, values = read[:, 0], read[:, 1]
    group = query.shape[1] // kv_heads
    for tile in chunk.tiles:
        count, seen = tile.mask.shape
        part = query[tile.queries].view(count, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, group * count, head_dim)
        scores = torch.bmm(part, keys[:, tile.keys].transpose(1, 2)).float().mul_(scale)
        softcap_(scores, softcap)
        shares = scores.view(kv_heads, group, count, seen).add_(tile.mask).softmax(-1).to(query.dtype)
        mixed = torch.bmm(shares.view(kv_heads, group * count, seen), values[:, tile.keys])
        out[tile.queries] = mixed.view(kv_heads, group, count, head_dim).permute(2, 0, 1, 3).reshape(count, -1, head_dim)


def _read(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """`blocks` of a `Gathered`, each one head's keys or values, as numbers: [tokens, head_dim]."""
    if cache.dtype is torch.int8:
        return read_blocks(cache, blocks, dtype)
    block_size, head_dim = cache.shape[3:]
    return cache.view(-1, block_size * head_dim).index_select(0, blocks).view(-1, head_dim)


def _attend_rows(query: Tensor, cache: Tensor, span: Singles | PagedSingles, scale: float, softcap: float) -> Tensor:
    if isinstance(span, PagedSingles):
        return attend_singles(query, cache, span, scale, softcap)
    return _attend_singles(query, cache, span, scale, softcap)


def _attend_singles(query: Tensor, cache: Tensor, span: Singles, scale: float, softcap: float) -> Tensor:
    """Queries [rows, heads, head_dim], in and out. The heads that share keys become queries of one head: keys are read once."""
    kv_heads, head_dim = cache.shape[1], query.shape[2]
    batch, group = len(query) * kv_heads, query.shape[1] // kv_heads
    read = _read(cache, span.blocks, query.dtype).view(batch, 1, 2, -1, head_dim)
    shared = query.view(batch, 1, group, head_dim)
    keys, values = read[:, :, 0], read[:, :, 1]
    if softcap:  # which torch's fused attention cannot do
        scores = softcap_((shared @ keys.transpose(2, 3)).float().mul_(scale), softcap)
        mixed = scores.add_(span.mask).softmax(-1).to(query.dtype) @ values
    else:
        mixed = F.scaled_dot_product_attention(shared, keys, values, attn_mask=span.mask, scale=scale)
    return mixed.reshape(query.shape)
