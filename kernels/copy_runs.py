"""Runs of bytes from places in host memory to others."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .native import native

HOLD_BELOW = 64 << 10
"""Bytes (5 µs) below which the interpreter is kept meanwhile: giving it up and waiting for it again costs more under load."""
_move_and_hold = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def copy_runs(layers: Sequence[tuple[int, int]], runs: NDArray[np.int64], *, again: bool = False) -> None:
    """Copy the same runs in each layer, given as the addresses of its source and of its destination. `runs` is [n, 3], contiguous:
    offset after the source, offset after the destination, length, in bytes. `again`: the copy is read again at once, so it had better be
    in the caches; else long runs are written past them.

    The interpreter is given up once for all of it: whoever has it then can keep it for 5 ms, as long as 64 MiB take.
    """
    if (kernels := native()) is None:
        copy_runs_memmove(layers, runs)
        return
    table = np.array(layers, np.int64)
    copy = kernels.copy_few if len(layers) * int(runs[:, 2].sum()) < HOLD_BELOW else kernels.copy_runs
    copy(table.ctypes.data, len(layers), runs.ctypes.data, len(runs), again)


def copy_runs_memmove(layers: Sequence[tuple[int, int]], runs: NDArray[np.int64]) -> None:
    """The same by the C library, a call for each: at 64 KiB in random places 13 GB/s; copy_runs.cpp reaches 19."""
    for source, destination in layers:
        for here, there, length in runs.tolist():
            move = _move_and_hold if length < HOLD_BELOW else ctypes.memmove
            move(destination + there, source + here, length)
