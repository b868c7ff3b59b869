"""Multiplying by a weight matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import Native, native_for
from .quantized import Quantized, Weight, dequantized
from .threads import threads

NATIVE_ROWS = 64
"""Up to so many rows of bf16 linear.cpp is at least as fast as oneDNN: 31 GB/s against 21 with one row, 1.6 times as fast with 16."""
FEW_ROWS = 24
"""Beyond so many linear_many.cpp is faster, where it is there: 141 GFLOP/s a core of a Xeon without AMX, linear.cpp has 105, oneDNN 82."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x [rows, in], weight [out, in], bias [out], the same dtype or the weight quantised.

    bf16, up to `rows_alike` rows: each row's sums are in one order, so they do not depend on how many rows there are.
    """
    if isinstance(weight, Quantized):
        return linear_quantized(x, weight, bias)
    count = threads()
    (rows, n_in), n_out = x.shape, weight.shape[0]  # not len(): of a tensor it costs 0.4 us, 500 times a step
    if (kernels := native_for(x)) is None or (kernel := kernels.linear if rows <= rows_alike(kernels) else kernels.linear_many) is None:
        return linear_torch(x, weight, bias)
    out = torch.empty(rows, n_out, dtype=x.dtype)
    kernel(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows,
        n_in,
        n_out,
        x.stride(0),
        weight.stride(0),
        count,
    )
    return out


def rows_alike(kernels: Native) -> int:
    """Up to how many rows of bf16 linear.cpp computes."""
    return NATIVE_ROWS if kernels.linear_many is None else FEW_ROWS


def linear_quantized(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """What `linear` makes of the same weights dequantised; up to `NATIVE_ROWS` rows of bf16 the kernel reads the numbers themselves."""
    (rows, n_in), n_out = x.shape, len(weight)
    if rows > NATIVE_ROWS or (kernels := native_for(x)) is None:
        parts = weight.parts(x.itemsize)
        outputs = [linear(x, dequantized(part, x.dtype), None if bias is None else bias[run]) for run, part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    out = torch.empty(rows, n_out, dtype=x.dtype)
    kernels.linear_quantized(
        out.data_ptr(),
        x.data_ptr(),
        weight.values.data_ptr(),
        weight.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight.bits,
        rows,
        n_in,
        n_out,
        x.stride(0),
        threads(),
    )
    return out


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by torch.

    A single bf16 row reads the weights at 18 to 23 GB/s through torch's own matrix-vector product and at 14 through
    oneDNN's, so oneDNN is left out there; from two rows on, and in fp32, oneDNN is faster.
    """
    if x.shape[0] > 1 or x.dtype != torch.bfloat16 or not x.is_cpu:
        return F.linear(x, weight, bias)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of the module, for mypy a ContextProp
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def linear_in_parts(x: Tensor, parts: Sequence[tuple[Weight, Tensor | None]]) -> Tensor:
    """`linear` by a matrix whose rows lie in several places: (weight, bias) of each, in order."""
    outputs = [linear(x, weight, bias) for weight, bias in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
