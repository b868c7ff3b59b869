"""Frequencies of the rotary embedding, for the variants of the families we know."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.model import Rope

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Radians per token of each pair of a head, fp32 [head_dim / 2], and the factor of cosine and sine.

    `ModelError` names an unknown rope type.
    """
    base = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    kind = rope.scaling.get("rope_type", "default")
    if kind in ("default", "dynamic"):
        # Dynamic scaling begins beyond the model's max_position_embeddings, and no request may be longer than that.
        return base, 1.0
    if kind == "linear":
        return base / _number(rope, "factor"), 1.0
    if kind == "llama3":
        return _llama3(base, rope), 1.0
    if kind == "yarn":
        return _yarn(base, rope), _yarn_stretch(rope)
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


def _yarn(base: Tensor, rope: Rope) -> Tensor:
    """Peng et al., 2023, section 3.2: pairs that turn often in the original context stay, those that turn seldom are stretched."""
    pairs, context = len(base), _number(rope, "original_max_position_embeddings")

    def pair(turns: float) -> float:
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair(_option(rope, "beta_fast", 32.0)), pair(_option(rope, "beta_slow", 1.0))
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    return base / _number(rope, "factor") * ramp + base * (1 - ramp)


def _yarn_stretch(rope: Rope) -> float:
    """Section 3.4, and DeepSeek's variant with two scales."""
    log = math.log(max(1.0, _number(rope, "factor"))) * 0.1
    scale, whole = _option(rope, "mscale", 0.0), _option(rope, "mscale_all_dim", 0.0)
    usual = (scale * log + 1) / (whole * log + 1) if scale and whole else log + 1
    return _option(rope, "attention_factor", usual)


def _option(rope: Rope, name: str, default: float) -> float:
    return _number(rope, name) if name in rope.scaling else default


def _number(rope: Rope, name: str) -> float:
    value = rope.scaling.get(name)
    if not isinstance(value, int | float):
        raise ModelError(f"The rope parameters lack a number {name}: {rope.scaling}.", field=name)
    return float(value)
