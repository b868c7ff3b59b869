"""Runs of bytes to or from one contiguous place, and the sums by which its other end knows that it has the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from .copy_runs import HOLD_BELOW, Piece, addresses, copy_runs_memmove
from .native import native

ROW = 4096
"""Bytes of a row of the table whose rows and columns are added up."""
WORDS = ROW // 8


def copy_summed(piece: Piece, place: Tensor, length: int, *, packed: bool) -> Tensor:
    """Copy the runs, as `copy_runs` does, and return `table_sums(place, length)`, in the same pass over memory.

    `place` (uint8, in host memory, a multiple of `ROW` long) is where they all end, each behind the one before it (`packed`), or where
    they all begin.
    """
    if (kernels := native()) is None:
        return copy_summed_torch(piece, place, length)
    layers, runs = addresses(piece[0]), piece[1]
    sums = torch.empty(WORDS + -(-length // ROW), dtype=torch.int64)
    copy = kernels.copy_summed_few if length < HOLD_BELOW else kernels.copy_summed
    where = (layers.buffer_info()[0], len(piece[0]), runs.buffer_info()[0], len(runs) // 3)
    copy(*where, packed, place.data_ptr(), length, sums.data_ptr())
    return sums


def copy_summed_torch(piece: Piece, place: Tensor, length: int) -> Tensor:
    """The same in three passes."""
    copy_runs_memmove([piece])
    return table_sums(place, length)


def table_sums(place: Tensor, length: int) -> Tensor:
    """The first `length` bytes of `place` (uint8, on any device, a multiple of `ROW` long) as a table of 64-bit words, its last row ended
    by zeros: int64, the sum of each column, then of each row.

    A word that changes changes a row and a column, so does one that moves.
    """
    whole = -(-length // ROW) * ROW
    place[length:whole] = 0
    table = place[:whole].view(torch.int64).view(-1, WORDS)
    return torch.cat([table.sum(0), table.sum(1)])
