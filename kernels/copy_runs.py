"""Runs of bytes from places in host memory to others."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain

from .native import native

HOLD_BELOW = 64 << 10
"""Bytes (5 µs) below which the interpreter is kept meanwhile: giving it up and waiting for it again costs more under load."""
_move_and_hold = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def copy_runs(layers: Sequence[tuple[int, int]], runs: array[int], *, again: bool = False) -> None:
    """Copy the same runs in each layer, given as the addresses of its source and of its destination. `runs` are 64-bit
    numbers, three a run: offset after the source, offset after the destination, length, in bytes. `again`: the copy is read again at once,
    so it had better be in the caches; else long runs are written past them.

    The interpreter is given up once for all of it: whoever has it then can keep it for 5 ms, as long as 64 MiB take.
    """
    if (kernels := native()) is None:
        copy_runs_memmove(layers, runs)
        return
    places = array("q", chain.from_iterable(layers))
    copy = kernels.copy_few if len(layers) * sum(runs[2::3]) < HOLD_BELOW else kernels.copy_runs
    copy(places.buffer_info()[0], len(layers), runs.buffer_info()[0], len(runs) // 3, again)


def copy_runs_memmove(layers: Sequence[tuple[int, int]], runs: array[int]) -> None:
    """The same by the C library, a call for each: at 64 KiB in random places 13 GB/s; copy_runs.cpp reaches 19."""
    for source, destination in layers:
        for here, there, length in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
            move = _move_and_hold if length < HOLD_BELOW else ctypes.memmove
            move(destination + there, source + here, length)
