"""From logits to drawn tokens, row by row as each asked. The host waits for the logits' device once for all rows, and once for each
draw that wants log-probabilities."""

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
    rows = zip(logits, draws, seen, choose(logits, draws, seen), strict=True)
    return [tuple(_drawn(row, *each) for each in zip(wanted, tokens, strict=True)) for row, wanted, _, tokens in rows]


def choose(logits: Tensor, draws: Sequence[Sequence[Draw]], seen: Sequence[Sequence[Seen | None]]) -> list[list[int]]:
    """The tokens alone."""
    tokens = chosen(logits, draws, seen)
    answer = iter(tokens.tolist())
    return [[next(answer) for _ in each] for each in draws]


def chosen(logits: Tensor, draws: Sequence[Sequence[Draw]], seen: Sequence[Sequence[Seen | None]]) -> Tensor:
    """The same, one behind the other, int64 on the logits' device, which need not have computed them yet."""
    plain = [[_is_likeliest(draw_, counted) for draw_, counted in zip(*each, strict=True)] for each in zip(draws, seen, strict=True)]
    likeliest = argmax(logits) if any(any(each) for each in plain) else None
    if likeliest is not None and all(len(each) == 1 and each[0] for each in plain):
        return likeliest
    tokens = []
    for row, (wanted, counts, simple) in enumerate(zip(draws, seen, plain, strict=True)):
        for draw_, counted, best in zip(wanted, counts, simple, strict=True):
            tokens.append(likeliest[row] if best and likeliest is not None else _token(logits[row], draw_, counted))
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64)


def _is_likeliest(draw_: Draw, seen: Seen | None) -> bool:
    return draw_.sampling.greedy and not _changes(draw_, seen)


def _changes(draw_: Draw, seen: Seen | None) -> bool:
    return bool(seen or draw_.sampling.logit_bias or draw_.banned)


def _drawn(logits: Tensor, draw_: Draw, token: int) -> Drawn:
    count = draw_.sampling.logprobs
    return Drawn(token) if count is None else Drawn(token, *log_probabilities(logits, token, count))


def _token(logits: Tensor, draw_: Draw, seen: Seen | None) -> Tensor:
    sampling = draw_.sampling
    adjusted = _adjusted(logits, draw_, seen) if _changes(draw_, seen) else logits
    if sampling.greedy:
        return adjusted.argmax()
    noise = Noise(seed=sampling.seed or 0, choice=draw_.choice, index=draw_.index)
    return draw(adjusted, noise, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)


def _adjusted(logits: Tensor, draw_: Draw, seen: Seen | None) -> Tensor:
    """Logits after bias, penalties and bans, as a copy in fp32."""
    sampling, logits = draw_.sampling, logits.to(torch.float32, copy=True)
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        logits[torch.tensor(tokens, device=logits.device)] += torch.tensor(biases, dtype=torch.float32, device=logits.device)
    if seen:
        penalise(
            logits,
            seen,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
        )
    if draw_.banned:
        logits[torch.tensor(sorted(draw_.banned), device=logits.device)] = -torch.inf
    return logits
