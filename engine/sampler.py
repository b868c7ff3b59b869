"""From logits to drawn tokens: all draws of a step in one go, each as it asks. Nobody waits for the logits' device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.argmax import argmax
from ..kernels.noise import Noise
from ..kernels.penalties import Seen, penalise
from ..kernels.sampling import Ask, draw, log_probabilities
from ..kernels.sent import sent
from .batch import Draw, Drawn

Wanted = tuple[int, Draw, Seen | None]
"""A draw, of which row of the logits, and what its penalties count, if it has any."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Draws, on the logits' device, which need not have made them yet. tokens: int64 [draws], one behind the other. numbers: what this host
    has to know of them, the tokens alone or fp64 with log-probabilities behind them."""

    tokens: Tensor
    numbers: Tensor
    draws: Sequence[Sequence[Draw]]

    def drawn(self, numbers: Sequence[Any]) -> list[tuple[Drawn, ...]]:
        """Of each row, one for each of its draws. `numbers`: those above, in this host's memory."""
        listed = [draw_ for each in self.draws for draw_ in each]
        drawn = iter(_with_log_probabilities(listed, numbers) if len(numbers) > len(listed) else map(Drawn, numbers))
        return [tuple([next(drawn) for _ in each]) for each in self.draws]


def sample(logits: Tensor, draws: Sequence[Sequence[Draw]], seen: Sequence[Sequence[Seen | None]]) -> Sampled:
    """The tokens drawn from each row of logits [rows, vocab] (any dtype; all arithmetic on them is fp32), one for each of `draws[row]`.
    `seen[row][i]`: what the penalties of `draws[row][i]` count, if it has any."""
    wanted = _listed(draws, seen)
    tokens = _tokens(logits, wanted)
    return Sampled(tokens, _told(logits, wanted, tokens), draws)


def _listed(draws: Sequence[Sequence[Draw]], seen: Sequence[Sequence[Seen | None]]) -> list[Wanted]:
    pairs = enumerate(zip(draws, seen, strict=True))
    return [(row, draw_, counted) for row, each in pairs for draw_, counted in zip(*each, strict=True)]


def _tokens(logits: Tensor, wanted: Sequence[Wanted]) -> Tensor:
    """Bias, penalties and bans change copies of the rows; all else is drawn from the logits as they are."""
    changed = [place for place, (_, draw_, counted) in enumerate(wanted) if counted or draw_.sampling.logit_bias or draw_.banned]
    if not changed:
        return _drawn_from(logits, [(row, draw_) for row, draw_, _ in wanted])
    some = [wanted[place] for place in changed]
    tokens = _drawn_from(_changed(logits, some), [(place, draw_) for place, (_, draw_, _) in enumerate(some)])
    others = [place for place in range(len(wanted)) if place not in changed]
    return _placed([(changed, tokens), (others, _drawn_from(logits, [wanted[place][:2] for place in others]))])


def _drawn_from(logits: Tensor, wanted: Sequence[tuple[int, Draw]]) -> Tensor:
    """The likeliest token of those that are greedy, and the others drawn."""
    greedy = [place for place, (_, draw_) in enumerate(wanted) if draw_.sampling.greedy]
    if len(greedy) == len(wanted) and [row for row, _ in wanted] == list(range(len(logits))):
        return argmax(logits)
    rows = sent(torch.tensor([wanted[place][0] for place in greedy], dtype=torch.int64), logits.device)
    asked = [place for place, (_, draw_) in enumerate(wanted) if not draw_.sampling.greedy]
    asks = [_ask(*wanted[place]) for place in asked]
    if not greedy:
        return draw(logits, asks)
    return _placed([(greedy, argmax(logits).index_select(0, rows)), (asked, draw(logits, asks))])


def _ask(row: int, draw_: Draw) -> Ask:
    sampling = draw_.sampling
    noise = Noise(seed=sampling.seed or 0, choice=draw_.choice, index=draw_.index)
    return Ask(row, noise, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def _placed(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Tokens at their places, of which each is in one part."""
    order = torch.tensor([place for places, _ in parts for place in places]).argsort()
    tokens = torch.cat([each for _, each in parts])
    return tokens.index_select(0, sent(order, tokens.device))


def _changed(logits: Tensor, wanted: Sequence[Wanted]) -> Tensor:
    """The rows that are wanted after bias, penalties and bans, one for each, copies in fp32."""
    device, vocab = logits.device, logits.shape[1]
    rows = [row for row, _, _ in wanted]
    picked = logits if rows == list(range(len(logits))) else logits.index_select(0, sent(torch.tensor(rows), device))
    changed = picked.to(torch.float32, copy=True)
    flat = changed.view(-1)
    biases = [(place * vocab + token, bias) for place, (_, draw_, _) in enumerate(wanted) for token, bias in draw_.sampling.logit_bias]
    if biases:
        places, values = zip(*biases, strict=True)
        flat.index_add_(0, sent(torch.tensor(places), device), sent(torch.tensor(values, dtype=torch.float32), device))
    _penalise(changed, wanted)
    banned = [place * vocab + token for place, (_, draw_, _) in enumerate(wanted) for token in sorted(draw_.banned)]
    if banned:
        flat.index_fill_(0, sent(torch.tensor(banned), device), -torch.inf)
    return changed


def _penalise(changed: Tensor, wanted: Sequence[Wanted]) -> None:
    penalised = [(place, draw_.sampling, counted) for place, (_, draw_, counted) in enumerate(wanted) if counted]
    if not penalised:
        return
    factors = [(each.repetition_penalty, each.presence_penalty, each.frequency_penalty) for _, each, _ in penalised]
    rows = sent(torch.tensor([place for place, _, _ in penalised]), changed.device)
    penalise(changed, [counted for _, _, counted in penalised], rows, sent(torch.tensor(factors, dtype=torch.float32), changed.device))


def _told(logits: Tensor, wanted: Sequence[Wanted], tokens: Tensor) -> Tensor:
    """The tokens; behind them, where log-probabilities are asked for, those of the logits as they were: of each such draw as many."""
    asked = [place for place, (_, draw_, _) in enumerate(wanted) if draw_.sampling.logprobs is not None]
    if not asked:
        return tokens
    most = max([wanted[place][1].sampling.logprobs or 0 for place in asked])
    numbers = sent(torch.tensor([[place, wanted[place][0]] for place in asked]), logits.device)
    table = log_probabilities(logits, numbers[:, 1].contiguous(), tokens.index_select(0, numbers[:, 0]), most)
    return torch.cat((tokens.double(), table.flatten()))


def _with_log_probabilities(draws: Sequence[Draw], told: Sequence[float]) -> list[Drawn]:
    """What `_told` says of these draws."""
    counts = [(place, draw_.sampling.logprobs) for place, draw_ in enumerate(draws) if draw_.sampling.logprobs is not None]
    most = max([count for _, count in counts])
    drawn = [Drawn(int(token)) for token in told[: len(draws)]]
    for number, (place, count) in enumerate(counts):
        own, total, *rest = told[len(draws) + number * (2 + 2 * most) :][: 2 + 2 * most]
        top = zip(rest[most : most + count], rest[:count], strict=True)
        drawn[place] = Drawn(drawn[place].token_id, own - total, tuple([(int(token), value - total) for token, value in top]))
    return drawn
