"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, frequencies: Tensor, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, times `stretch`: fp32, [tokens, 1, head_dim / 2] each.

    positions: [tokens]; frequencies: fp32, [head_dim / 2], radians per token.
    """
    angles = (positions.float()[:, None] * frequencies)[:, None, :]
    return angles.cos().mul_(stretch), angles.sin().mul_(stretch)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with each pair (x[i], x[i + head_dim / 2]) turned by its angle, in `x`'s dtype.

    x: [tokens, heads, head_dim]; cos, sin: fp32, [tokens, 1, head_dim / 2]. Su et al., 2021, in the half-split order of
    the Hugging Face checkpoints.
    """
    half = x.shape[-1] // 2
    left, right = x[..., :half].float(), x[..., half:].float()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
