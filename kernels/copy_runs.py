"""Runs of bytes from one place in host memory to another."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from .native import native

HOLD_BELOW = 64 << 10
"""Bytes (5 µs) below which the interpreter is kept meanwhile: giving it up and waiting for it again costs more under load."""
_move_and_hold = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def copy_runs(source: int, destination: int, runs: Sequence[tuple[int, int, int]], *, again: bool = False) -> None:
    """Copy each run, `(offset after source, offset after destination, length)`, in bytes; `source` and `destination` are addresses.
    `again`: the copy is read again at once, so it had better be in the caches; else long runs are written past them."""
    if (kernels := native()) is None:
        copy_runs_memmove(source, destination, runs)
        return
    table = np.array(runs, np.int64)
    copy = kernels.copy_few if table[:, 2].sum() < HOLD_BELOW else kernels.copy_runs
    copy(source, destination, table.ctypes.data, len(table), again)


def copy_runs_memmove(source: int, destination: int, runs: Sequence[tuple[int, int, int]]) -> None:
    """The same by the C library, a call for each: at 64 KiB in random places 13 GB/s; copy_runs.cpp reaches 19."""
    for here, there, length in runs:
        move = _move_and_hold if length < HOLD_BELOW else ctypes.memmove
        move(destination + there, source + here, length)
