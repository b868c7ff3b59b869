"""The activation of the MLP on a GPU: each element read and written once. The twin is `gated_torch`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024


@triton.jit
def _gated(
    out_ptr: tl.tensor, gate_up_ptr: tl.tensor, row_stride: tl.tensor, width: tl.tensor, SILU: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    gate_ptr = gate_up_ptr + row * row_stride + at
    gate = tl.load(gate_ptr, mask=inside, other=0.0)
    up = tl.load(gate_ptr + width, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    # x / 2 * (1 + tanh(u)) is x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
    slope = x if SILU else x * (1.5957691216057308 + 0.07135481282553156 * x * x)
    opened = (x * tl.sigmoid(slope)).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + at, opened * up, mask=inside)


def gated(out: Tensor, gate_up: Tensor, silu: bool) -> None:
    """As `kernels.gated`; out: [tokens, intermediate]. Not `silu`: gelu_tanh."""
    tokens, width = out.shape
    _gated[(tokens, triton.cdiv(width, WIDTH))](out, gate_up, gate_up.stride(0), width, SILU=silu, WIDTH=WIDTH)
