"""Rows with several new tokens each, attended over the paged cache where it lies, all at once (gpu/attend_chunks.py).

The twin is `attend` over a `Chunk` for each (paged_attention.py), which gathers keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .paging import Paging, padded


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
