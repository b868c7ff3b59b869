"""Runs from a pool of one dtype to a pool of another, in host memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..core.layout import DType
from ..kernels.int8_rows import decode, encode
from .crossing import Place
from .geometry import Table, runs_in
from .pool import DTYPES

TOO_LARGE = "float16, in which it is to be held here, ends at 65504, and there is a larger number"


def cast_runs(source: int, reads: Place, destination: int, writes: Place, runs: Table) -> None:
    """Copy each run, which counts the numbers of whole rows, from the address `source` to the address `destination`, where they are held as
    `reads` and `writes` say. Raises `OverflowError` if that is float16, and cannot hold one."""
    here = _rows(source, reads, max(offset + length for offset, _, length in runs_in(runs)))
    there = _rows(destination, writes, max(offset + length for _, offset, length in runs_in(runs)))
    for offset, offset_there, length in runs_in(runs):
        numbers = _part(here, reads.head_dim, offset, length)
        if reads.dtype is DType.INT8:
            numbers = decode(numbers, torch.float32)
        held = _part(there, writes.head_dim, offset_there, length)
        held.copy_(encode(numbers) if writes.dtype is DType.INT8 else numbers)
        if writes.dtype is DType.FLOAT16 and not held.isfinite().all():
            raise OverflowError(TOO_LARGE)


def _rows(address: int, place: Place, numbers: int) -> Tensor:
    """A view of what lies at `address`, [rows, width]. It does not keep the mapping from being closed."""
    dtype, elements = DTYPES[place.dtype], numbers // place.head_dim * place.width
    flat = torch.frombuffer((ctypes.c_uint8 * (elements * dtype.itemsize)).from_address(address), dtype=dtype)
    return flat.view(-1, place.width)


def _part(rows: Tensor, head_dim: int, offset: int, length: int) -> Tensor:
    return rows[offset // head_dim : (offset + length) // head_dim]
