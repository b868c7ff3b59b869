"""The residual sum and the root mean square norms around it."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import native_for, threads_for
from .rms_norm import rms_norm
from .triton_kernels import triton_for


def residual_norm(x: Tensor, change: Tensor, change_weight: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(sum, rms_norm(sum))` where sum is `x + change`, or `x + rms_norm(change)` if there is a `change_weight`.

    x, change: [rows, n], contiguous, the same dtype; weights: fp32 [n].
    """
    on_gpu, kernels = triton_for(x), native_for(x)
    if on_gpu is None and kernels is None:
        return residual_norm_torch(x, change, change_weight, weight, eps)
    rows, n = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if on_gpu is not None:
        on_gpu.residual_norm(total, normed, x, change, change_weight, weight, eps)
        return total, normed
    assert kernels is not None
    kernels.residual_norm(
        total.data_ptr(),
        normed.data_ptr(),
        x.data_ptr(),
        change.data_ptr(),
        None if change_weight is None else change_weight.data_ptr(),
        weight.data_ptr(),
        rows,
        n,
        eps,
        threads_for(rows * n),
    )
    return total, normed


def residual_norm_torch(x: Tensor, change: Tensor, change_weight: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    total = x + (change if change_weight is None else rms_norm(change, change_weight, eps))
    return total, rms_norm(total, weight, eps)
