"""Soft caps: Gemma 2 keeps attention scores and logits from growing."""

from __future__ import annotations

from torch import Tensor


def softcap_(scores: Tensor, cap: float) -> Tensor:
    """`cap * tanh(scores / cap)`, in place; nothing if cap is 0."""
    return scores.div_(cap).tanh_().mul_(cap) if cap else scores
