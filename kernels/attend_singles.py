"""Attention of rows with one new token each, over the paged cache where it lies (attend_singles.cpp).

The sum of a row does not depend on the others. The twin is `attend` over `Singles` (paged_attention.py), which gathers keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .native import native
from .paging import Paging, padded
from .threads import threads


@dataclass(frozen=True, slots=True)
class PagedSingles:
    """Rows with one new token each, at places `tokens` [rows] of the step. All int64: tables [rows, n], the blocks from the first with
    a key that is seen; firsts, lasts [rows], the positions seen."""

    tokens: Tensor
    tables: Tensor
    firsts: Tensor
    lasts: Tensor


def fits(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether `attend_singles` can compute it there, by the C++ kernel. dtype: the model's; its cache may be int8."""
    return dtype is torch.bfloat16 and head_dim % 16 == 0 and device.type == "cpu" and native() is not None


def make_paged_singles(tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], paging: Paging) -> PagedSingles:
    """Rows whose one new token is at place `tokens[r]` of the step and at `positions[r]` of its sequence."""
    size = paging.block_size
    firsts = [paging.first_key(position) for position in positions]
    runs = [table[first // size : last // size + 1] for table, first, last in zip(tables, firsts, positions, strict=True)]
    return PagedSingles(torch.tensor(tokens), torch.from_numpy(padded(runs)), torch.tensor(firsts), torch.tensor(positions))


def attend_singles(query: Tensor, cache: Tensor, span: PagedSingles, scale: float, softcap: float) -> Tensor:
    """Queries [rows, heads, head_dim], bf16, contiguous, in and out; cache as in `attend`."""
    kernels = native()
    assert kernels is not None, "a span that `fits` did not allow"
    out = torch.empty_like(query)
    (rows, heads, head_dim), (_, kv_heads, _, block_size, _) = query.shape, cache.shape
    kernels.attend_singles(
        out.data_ptr(),
        query.data_ptr(),
        cache.data_ptr(),
        span.tables.data_ptr(),
        span.firsts.data_ptr(),
        span.lasts.data_ptr(),
        rows,
        span.tables.shape[1],
        heads,
        kv_heads,
        block_size,
        head_dim,
        scale,
        softcap,
        cache.dtype is torch.int8,
        threads(),
    )
    return out
