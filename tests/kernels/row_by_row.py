"""Draws one after another, each the slow and obvious way: sort the row, cut off what the limits do not let through, add all noise."""

from __future__ import annotations

import math

import torch
from diptych.kernels.noise import Noise
from diptych.kernels.sampling import Ask, draw
from torch import Tensor


def survivors(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits [vocab] divided by the temperature, and ids, of the tokens that are let through, likeliest first, of equal ones the first."""
    raw, tokens = logits.sort(descending=True, stable=True)
    values = raw.float() / temperature
    values, tokens = values[: top_k or None], tokens[: top_k or None]
    if top_p < 1.0:
        shares = (values - values.logsumexp(0)).exp()
        kept = max(1, int(((shares.cumsum(0) - shares) < top_p).sum()))
        values, tokens = values[:kept], tokens[:kept]
    if min_p > 0.0:
        kept = int((values >= values[0] + math.log(min_p)).sum())
        values, tokens = values[:kept], tokens[:kept]
    return values, tokens


def slow(logits: Tensor, ask: Ask) -> int:
    """The token of one draw from logits [rows, vocab]."""
    row = logits[ask.row]
    values, tokens = survivors(row, ask.top_k, ask.top_p, ask.min_p, ask.temperature)
    kept = torch.full((len(row),), -math.inf).index_copy_(0, tokens, values)
    return int((kept + ask.noise.of_all(len(row))).argmax())


def one(logits: Tensor, noise: Noise, *, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """What the kernels draw from logits [vocab], int64 []."""
    return draw(logits[None], [Ask(0, noise, temperature, top_k, top_p, min_p)])[0]
