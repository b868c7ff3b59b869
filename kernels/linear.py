"""Multiplying by a weight matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x [rows, in], weight [out, in], bias [out], the same dtype.

    A single bf16 row reads the weights at 18 to 23 GB/s through torch's own matrix-vector product and at 14 through
    oneDNN's, so oneDNN is left out there; from two rows on, and in fp32, oneDNN is faster.
    """
    if x.shape[0] > 1 or x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of the module, for mypy a ContextProp
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def linear_in_parts(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """`linear` by a matrix whose rows lie in several places: (weight, bias) of each, in order."""
    outputs = [linear(x, weight, bias) for weight, bias in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
