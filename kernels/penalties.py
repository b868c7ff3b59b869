"""What a sequence has said before, and how much less it is to be said again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sent import sent

CPU = torch.device("cpu")


class Seen:
    """The tokens of a sequence, `tokens` (int64 [n]), distinct on a CPU, and how often its output holds each, `counts` (fp32 [n]).

    Penalties touch these n logits only: a sequence holds far fewer distinct tokens than the vocabulary's 262,144.
    """

    def __init__(self, history: Sequence[int], output: int, device: torch.device = CPU) -> None:
        """`history`: prompt and output, of which the last `output` tokens are the output."""
        tokens, places = torch.unique(torch.tensor(history, dtype=torch.int64), return_inverse=True)
        counts = torch.bincount(places[len(history) - output :], minlength=len(tokens)).float()
        self._places = {token: place for place, token in enumerate(tokens.tolist())}
        self.tokens, self.counts = sent(tokens, device), sent(counts, device)

    def add(self, token: int) -> None:
        """The output holds one more `token`."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self.tokens):
            self.tokens = torch.cat((self.tokens, self.tokens.new_full((1,), token)))
            self.counts = torch.cat((self.counts, self.counts.new_zeros(1)))
        self.counts[place] += 1.0

    def add_there(self, token: Tensor) -> None:
        """As `add`, to a history that is not empty, of a token on the device, int64 [1], which the host does not know yet. It becomes one
        more of `tokens`, also if it is there already: equal ones have equal counts, so that it is the same which is written last."""
        same = self.tokens == token
        count = (self.counts * same).amax(0, keepdim=True)
        self.tokens, self.counts = torch.cat((self.tokens, token)), torch.cat((self.counts + same, count + 1.0))


def penalise(logits: Tensor, seen: Sequence[Seen], rows: Tensor, factors: Tensor) -> None:
    """Lower fp32 logits [rows, vocab] in place: row `rows[i]` (int64 [n], distinct) by what `seen[i]` holds and by factors[i], fp32 [n, 3]:
    repetition, presence, frequency. Repetition first, over prompt and output (Keskar et al., "CTRL", 2019, section 4.1); then frequency and
    presence, over the output (OpenAI: logit - frequency * count - presence * [count > 0])."""
    tokens, counts = torch.cat([each.tokens for each in seen]), torch.cat([each.counts for each in seen])
    owners = [torch.full((each.tokens.shape[0],), number) for number, each in enumerate(seen)]
    owner = sent(torch.cat(owners), logits.device)
    places = rows.index_select(0, owner) * logits.shape[1] + tokens
    repetition, presence, frequency = factors.index_select(0, owner).unbind(1)
    flat = logits.view(-1)
    values = flat.index_select(0, places)
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat.index_copy_(0, places, values - (frequency * counts + presence * (counts > 0)))
