"""From logits to drawn tokens, row by row as each asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.argmax import argmax
from ..kernels.noise import Noise
from ..kernels.penalties import Seen, penalise
from ..kernels.sampling import draw, log_probabilities
from .batch import Draw, Drawn


def sample(logits: Tensor, draws: Sequence[Sequence[Draw]], seen: Sequence[Sequence[Seen | None]]) -> list[tuple[Drawn, ...]]:
    """The tokens drawn from each row of logits [rows, vocab] (any dtype; all arithmetic on them is fp32), one for each of `draws[row]`.
    `seen[row][i]`: what the penalties of `draws[row][i]` count, if it has any."""
    greedy = any(draw_.sampling.greedy for each in draws for draw_ in each)
    likeliest = argmax(logits).tolist() if greedy else [0] * len(draws)
    rows = zip(logits, draws, seen, likeliest, strict=True)
    return [
        tuple(_sample(row, draw_, counted, best) for draw_, counted in zip(each, counts, strict=True)) for row, each, counts, best in rows
    ]


def _sample(logits: Tensor, draw_: Draw, seen: Seen | None, likeliest: int) -> Drawn:
    sampling = draw_.sampling
    changed = bool(seen or sampling.logit_bias or draw_.banned)
    if sampling.greedy and sampling.logprobs is None and not changed:
        return Drawn(likeliest)
    wide = logits.float()
    adjusted = _adjusted(wide, draw_, seen) if changed else wide
    token = _token(adjusted, draw_) if changed or not sampling.greedy else likeliest
    if sampling.logprobs is None:
        return Drawn(token)
    logprob, top = log_probabilities(wide, token, sampling.logprobs)
    return Drawn(token, logprob, top)


def _adjusted(logits: Tensor, draw_: Draw, seen: Seen | None) -> Tensor:
    """Logits after bias, penalties and bans, as a copy."""
    sampling, logits = draw_.sampling, logits.clone()
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        logits[torch.tensor(tokens)] += torch.tensor(biases, dtype=torch.float32)
    if seen:
        penalise(
            logits,
            seen,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
        )
    logits[torch.tensor(sorted(draw_.banned), dtype=torch.int64)] = -torch.inf
    return logits


def _token(logits: Tensor, draw_: Draw) -> int:
    sampling = draw_.sampling
    if sampling.greedy:
        return int(logits.argmax())
    noise = Noise(seed=sampling.seed or 0, choice=draw_.choice, index=draw_.index)
    return draw(logits, noise, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
