"""Rows with several new tokens each, attended over the paged cache where it lies, all at once (gpu/attend_chunks.py, attend_chunks.cpp).

A row's result does not depend on the others. The twin is `attend` over a `Chunk` for each (paged_attention.py), which gathers keys and
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .native import native
from .paging import Paging, padded
from .threads import threads


@dataclass(frozen=True, slots=True)
class PagedChunks:
    """Rows with several new tokens each, which stand side by side in the step. All int64: places [rows], of a row's first; sums [rows + 1],
    how many the rows before have; positions [rows], of the first in its sequence; tables [rows, n], the blocks from the first with a key
    that it sees. `tokens`: how many there are in all; `window` as in `Paging`."""

    places: Tensor
    sums: Tensor
    positions: Tensor
    tables: Tensor
    tokens: int
    window: int


def make_paged_chunks(chunks: Sequence[tuple[int, int, int, Sequence[int]]], paging: Paging) -> PagedChunks:
    """Rows as `make_chunk` takes them: where a row's new tokens begin in the step and in its sequence, how many they are, and its table."""
    places, starts, lengths, tables = zip(*chunks, strict=True)
    ends = [(start + length - 1) // paging.block_size + 1 for start, length in zip(starts, lengths, strict=True)]
    runs = [table[paging.first_block(start) : end] for table, start, end in zip(tables, starts, ends, strict=True)]
    return PagedChunks(
        places=torch.tensor(places),
        sums=torch.from_numpy(np.cumsum([0, *lengths])),
        positions=torch.tensor(starts),
        tables=torch.from_numpy(padded(runs)),
        tokens=sum(lengths),
        window=paging.window,
    )


def attend_chunks(out: Tensor, query: Tensor, cache: Tensor, span: PagedChunks, scale: float, softcap: float) -> None:
    """By the C++ kernel, where `attend_singles.fits`: rows of query [tokens, heads, head_dim], bf16, contiguous, to the same rows of
    `out`, likewise; cache as in `attend`."""
    kernels = native()
    assert kernels is not None, "a span that `fits` did not allow"
    (rows, width), (_, heads, head_dim), (_, kv_heads, _, block_size, _) = span.tables.shape, query.shape, cache.shape
    kernels.attend_chunks(
        out.data_ptr(),
        query.data_ptr(),
        cache.data_ptr(),
        span.places.data_ptr(),
        span.sums.data_ptr(),
        span.positions.data_ptr(),
        span.tables.data_ptr(),
        rows,
        width,
        span.window,
        heads,
        kv_heads,
        block_size,
        head_dim,
        scale,
        softcap,
        cache.dtype is torch.int8,
        threads(),
    )
