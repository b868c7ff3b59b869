"""Frequencies of the rotary embedding, for the variants of the families we know."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.model import Rope

ROPE_TYPES = ("default", "linear", "llama3")


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per token of each pair of a head: fp32 [head_dim / 2]. `ModelError` names an unknown rope type."""
    base = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    kind = rope.scaling.get("rope_type", "default")
    if kind == "default":
        return base
    if kind == "linear":
        return base / _number(rope, "factor")
    if kind == "llama3":
        return _llama3(base, rope)
    raise ModelError(f"Rope type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are.", field="rope_type")


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones are stretched by `factor`, those between are blended."""
    factor, low, high = (_number(rope, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = _number(rope, "original_max_position_embeddings")
    wavelength = 2 * math.pi / base
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * base / factor + blend * base
    stretched = torch.where(wavelength > context / low, base / factor, base)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(between, blended, stretched)


def _number(rope: Rope, name: str) -> float:
    value = rope.scaling.get(name)
    if not isinstance(value, int | float):
        raise ModelError(f"The rope parameters lack a number {name}: {rope.scaling}.", field=name)
    return float(value)
