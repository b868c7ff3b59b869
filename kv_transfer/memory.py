"""Three system calls that Python's own modules do not offer."""

from __future__ import annotations

import ctypes
import mmap
import warnings

import torch

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_HOLD_BELOW = 64 << 10
"""Runs shorter than this (5 µs) are copied with the GIL held: giving it up and waiting for it again costs more under load."""
_copy_and_hold = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def address_of(mapped: mmap.mmap) -> int:
    """Where `mapped` begins in this process; good until it is closed."""
    with warnings.catch_warnings():
        # A read-only buffer cannot tell its address any other way; nothing is written through this tensor.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()


def copy_runs(source: int, destination: int, runs: list[tuple[int, int, int]]) -> None:
    """Copy each `(source offset, destination offset, length)`; `source` and `destination` are addresses."""
    for here, there, length in runs:
        move = _copy_and_hold if length < _HOLD_BELOW else ctypes.memmove
        move(destination + there, source + here, length)


def take_pages(address: int, length: int) -> bool:
    """Have the kernel back [address, address + length) with memory now, without changing what it holds and without the GIL.

    False where the kernel cannot (before Linux 5.14): pages then come at their first use.
    """
    return bool(_libc.madvise(address, length, _MADV_POPULATE_WRITE) == 0)
