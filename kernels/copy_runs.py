"""Runs of bytes from places in host memory to others."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain, product

from .native import native

HOLD_BELOW = 64 << 10
"""Bytes (5 µs) below which the interpreter is kept meanwhile: giving it up and waiting for it again costs more under load."""
_move_and_hold = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


Piece = tuple[Sequence[tuple[int, int]], "array[int]"]
"""Layers, each by the addresses of its source and of its destination, and the runs to copy in each of them: 64-bit numbers, three a run,
offset after the source, offset after the destination, length, in bytes."""


def copy_runs(pieces: Sequence[Piece], *, again: bool = False) -> None:
    """Copy each piece. `again`: the copies are read again at once, so they had better be in the caches; else long runs are written past
    them.

    The interpreter is given up once for all of it: whoever has it then can keep it for 5 ms, as long as 64 MiB take.
    """
    if (kernels := native()) is None:
        copy_runs_memmove(pieces)
        return
    table, kept = array("q"), []  # `kept`: what has an address in the table must live until the copy is made
    for layers, runs in pieces:
        places = addresses(layers)
        kept.append(places)
        table.extend((places.buffer_info()[0], len(layers), runs.buffer_info()[0], len(runs) // 3))
    copy = kernels.copy_few if sum(len(layers) * sum(runs[2::3]) for layers, runs in pieces) < HOLD_BELOW else kernels.copy_runs
    copy(table.buffer_info()[0], len(pieces), again)


def addresses(layers: Sequence[tuple[int, int]]) -> array[int]:
    """Of a piece's layers, for code that takes an address."""
    return array("q", chain.from_iterable(layers))


def copy_runs_memmove(pieces: Sequence[Piece]) -> None:
    """The same by the C library, a call for each: at 64 KiB in random places 5.4 GB/s on a Sapphire Rapids; copy_runs.cpp reaches 10.5."""
    for layers, runs in pieces:
        for (source, destination), (here, there, length) in product(layers, zip(runs[::3], runs[1::3], runs[2::3], strict=True)):
            move = _move_and_hold if length < HOLD_BELOW else ctypes.memmove
            move(destination + there, source + here, length)
