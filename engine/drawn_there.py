"""What was drawn last in each slot, in a device's memory: a step's inputs there, while the host does not know it yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.sent import sent
from .batch import Row
from .inputs import Inputs


class DrawnThere:
    """As `last_drawn.LastDrawn`, on a device. Its memory stays where it is: captured steps read it."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.names = range(-1, -1 - slots, -1)
        """What inputs made by the host have in place of the token of slot s, at s; no token is negative."""

    def filled(self, inputs: Inputs) -> Inputs:
        """Inputs, on the device, with tokens in place of their names."""
        ids = inputs.token_ids
        slots = (-1 - ids).clamp_(min=0)
        return replace(inputs, token_ids=torch.where(ids < 0, self._tokens.index_select(0, slots), ids))

    def note(self, rows: Sequence[Row], tokens: Tensor) -> None:
        """`tokens`, on the device: of the draws of these rows, one behind the other. A slot's token is that of its row's first draw."""
        firsts, place = [], 0
        for row in rows:
            firsts.append((row.slot, place))
            place += len(row.draws)
        slots, places = sent(torch.tensor(firsts).T.contiguous(), tokens.device).unbind(0)
        self._tokens.index_copy_(0, slots, tokens.index_select(0, places))

    def of(self, slot: int) -> Tensor:
        """The token of a slot, int64 [1], until the next is noted."""
        return self._tokens[slot : slot + 1]
