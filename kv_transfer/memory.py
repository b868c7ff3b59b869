"""Memory by its address: what Python's own modules do not offer."""

from __future__ import annotations

import ctypes
import mmap
import warnings

import torch

from .geometry import Runs

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


def copy_runs(source: int, destination: int, runs: Runs) -> None:
    """Copy each run, in bytes; `source` and `destination` are addresses."""
    for here, there, length in runs:
        move = _copy_and_hold if length < _HOLD_BELOW else ctypes.memmove
        move(destination + there, source + here, length)


def cast_runs(source: int, reads: torch.dtype, destination: int, writes: torch.dtype, runs: Runs) -> None:
    """Copy each run, in elements, of dtype `reads` at the address `source`, and round it to `writes` at the address `destination`."""
    here = _elements(source, reads, max(offset + length for offset, _, length in runs))
    there = _elements(destination, writes, max(offset + length for _, offset, length in runs))
    for offset, offset_there, length in runs:
        there[offset_there : offset_there + length].copy_(here[offset : offset + length])


def _elements(address: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """A view of what lies at `address`. It does not keep the mapping from being closed."""
    return torch.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def take_pages(address: int, length: int) -> bool:
    """Have the kernel back [address, address + length) with memory now, without changing what it holds and without the GIL.

    False where the kernel cannot (before Linux 5.14): pages then come at their first use.
    """
    return bool(_libc.madvise(address, length, _MADV_POPULATE_WRITE) == 0)
