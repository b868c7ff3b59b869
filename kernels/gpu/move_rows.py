"""Rows from one table to another on a GPU: gathered, cast and scattered in one pass. The twin is `move_rows_torch`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BYTES = 4096
"""Of a row that a program moves: 32 of each of its 128 threads."""


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["to_ptr", "from_ptr"])  # a number at a time
def _move_rows(
    there_ptr: tl.tensor,
    here_ptr: tl.tensor,
    to_ptr: tl.tensor,
    from_ptr: tl.tensor,
    fits_ptr: tl.tensor,
    length: tl.tensor,
    parts: tl.tensor,
    CHECKED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    # One axis: a grid's others end at 65,535, and a piece may have more rows.
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    at = part * WIDTH + tl.arange(0, WIDTH)
    inside = at < length
    read = tl.load(here_ptr + tl.load(from_ptr + row) * length + at, mask=inside, other=0)
    made = read.to(there_ptr.dtype.element_ty)
    tl.store(there_ptr + tl.load(to_ptr + row) * length + at, made, mask=inside)
    if CHECKED:
        wide = made.to(tl.float32)
        odd = tl.sum(((wide - wide) != 0.0).to(tl.int32), axis=0)  # infinity less itself is no number, and that is not 0
        tl.store(fits_ptr, tl.zeros([], tl.int8), mask=odd > 0)


def move_rows(fits: Tensor, source: Tensor, destination: Tensor, here: Tensor, there: Tensor, checked: bool) -> None:
    """As `kernels.move_rows`; fits: int8 [], made 0 if `checked` and something that was stored is no finite number."""
    length = source.shape[1]
    width = min(BYTES // source.element_size(), triton.next_power_of_2(length))
    parts = triton.cdiv(length, width)
    _move_rows[(len(here) * parts,)](destination, source, there, here, fits, length, parts, CHECKED=checked, WIDTH=width)
