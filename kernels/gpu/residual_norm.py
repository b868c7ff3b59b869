"""The residual sum and the norms around it on a GPU: a program has a row in its registers, read and written once. The twin is
`residual_norm_torch`, and it rounds where this does."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WARP_ELEMENTS = 512


@triton.jit
def _residual_norm(
    total_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    x_ptr: tl.tensor,
    change_ptr: tl.tensor,
    change_weight_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    n: tl.tensor,
    eps: tl.tensor,
    NORM_CHANGE: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * n
    at = tl.arange(0, ROW)
    inside = at < n
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0)
    change = tl.load(change_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    if NORM_CHANGE:
        change_weight = tl.load(change_weight_ptr + at, mask=inside, other=0.0)
        scale = tl.rsqrt(tl.sum(change * change) / n + eps)
        change = (change * scale * change_weight).to(x.dtype).to(tl.float32)
    total = (x.to(tl.float32) + change).to(x.dtype)
    tl.store(total_ptr + start + at, total, mask=inside)
    wide = total.to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(normed_ptr + start + at, wide * tl.rsqrt(tl.sum(wide * wide) / n + eps) * weight, mask=inside)


def residual_norm(
    total: Tensor, normed: Tensor, x: Tensor, change: Tensor, change_weight: Tensor | None, weight: Tensor, eps: float
) -> None:
    """As `kernels.residual_norm`, to `total` and `normed`."""
    rows, n = x.shape
    row = triton.next_power_of_2(n)
    _residual_norm[(rows,)](
        total,
        normed,
        x,
        change,
        weight if change_weight is None else change_weight,
        weight,
        n,
        eps,
        NORM_CHANGE=change_weight is not None,
        ROW=row,
        num_warps=min(16, max(1, row // WARP_ELEMENTS)),
    )
