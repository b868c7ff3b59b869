"""From logits to drawn tokens, row by row as each asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..kernels.sampling import Noise, draw, log_probabilities
from .batch import Draw, Drawn


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One drawn token for each row of logits [draws, vocab] (any dtype; all arithmetic on them is fp32)."""
    likeliest = logits.max(dim=-1).indices.tolist() if any(each.sampling.greedy for each in draws) else [0] * len(draws)
    return [_sample(row, each, best) for row, each, best in zip(logits, draws, likeliest, strict=True)]


def _sample(logits: Tensor, draw_: Draw, likeliest: int) -> Drawn:
    sampling = draw_.sampling
    if sampling.greedy and sampling.logprobs is None:
        return Drawn(likeliest)
    wide = logits.float()
    token = likeliest
    if not sampling.greedy:
        noise = Noise(seed=sampling.seed or 0, choice=draw_.choice, index=draw_.index)
        token = draw(wide, noise, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    if sampling.logprobs is None:
        return Drawn(token)
    logprob, top = log_probabilities(wide, token, sampling.logprobs)
    return Drawn(token, logprob, top)
