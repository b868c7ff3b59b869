"""Layer norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension, computed in fp32, in `x`'s dtype.

    x: [..., n]; weight, bias: fp32 [n]. Ba, Kiros and Hinton, 2016.
    """
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)
