"""What a sequence has said before, and how much less it is to be said again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Seen:
    """The distinct tokens of a sequence, `tokens` (int64 [n]), and how often its output holds each, `counts` (fp32 [n]).

    Penalties touch these n logits only: a sequence holds far fewer distinct tokens than the vocabulary's 262,144.
    """

    def __init__(self, history: Sequence[int], output: int, device: torch.device | None = None) -> None:
        """`history`: prompt and output, of which the last `output` tokens are the output."""
        self.tokens, places = torch.unique(torch.tensor(history, dtype=torch.int64), return_inverse=True)
        self.counts = torch.bincount(places[len(history) - output :], minlength=len(self.tokens)).float().to(device)
        self._places = {token: place for place, token in enumerate(self.tokens.tolist())}
        self.tokens = self.tokens.to(device)

    def add(self, token: int) -> None:
        """The output holds one more `token`."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self.tokens):
            self.tokens = torch.cat((self.tokens, self.tokens.new_full((1,), token)))
            self.counts = torch.cat((self.counts, self.counts.new_zeros(1)))
        self.counts[place] += 1.0


def penalise(logits: Tensor, seen: Seen, *, repetition: float, presence: float, frequency: float) -> None:
    """Lower fp32 logits [vocab] in place. Repetition first, over prompt and output (Keskar et al., "CTRL", 2019, section 4.1); then
    frequency and presence, over the output (OpenAI: logit - frequency * count - presence * [count > 0])."""
    values = logits[seen.tokens]
    if repetition != 1.0:
        values = torch.where(values > 0, values / repetition, values * repetition)
    logits[seen.tokens] = values - (frequency * seen.counts + presence * (seen.counts > 0))
