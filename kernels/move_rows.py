"""Rows of one table to rows of another: what a transfer gathers, casts and scatters."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_kernels import triton_on


def move_rows(source: Tensor, destination: Tensor, here: Tensor, there: Tensor) -> Tensor | None:
    """Row `here[i]` of source [n, length] becomes row `there[i]` of destination [m, length], rounded to its dtype.

    here, there: int64 [moves], those of `there` distinct; the two tables do not overlap. Where it is rounded to float16: one truth value
    on the device, whether all that was stored is finite; else None.
    """
    checked = destination.dtype is torch.float16 and source.dtype is not torch.float16
    if (on_gpu := triton_on(destination.device)) is None:
        return move_rows_torch(source, destination, here, there, checked)
    fits = torch.ones((), dtype=torch.int8, device=destination.device)
    on_gpu.move_rows(fits, source, destination, here, there, checked)
    return fits.bool() if checked else None


def move_rows_torch(source: Tensor, destination: Tensor, here: Tensor, there: Tensor, checked: bool) -> Tensor | None:
    """The same by torch, in two passes and a third for a check."""
    moved = source.index_select(0, here).to(destination.dtype)
    destination.index_copy_(0, there, moved)
    return moved.isfinite().all() if checked else None
