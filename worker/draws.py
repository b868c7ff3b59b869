"""What a step is asked to draw. Both schedulers ask in the same way, so that every path draws the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.sampling import SamplingParams
from ..engine.batch import Draw


def next_draw(sampling: SamplingParams, index: int, tokens: Sequence[int], ends: frozenset[int], *, pending: bool) -> Draw:
    """Draw output token `index` behind `tokens`, prompt and output as far as known; `pending` if more are in flight in the row's
    slot, whose history the engine then has. `ends`: the tokens that end the output."""
    return Draw(
        sampling,
        index,
        history=tuple(tokens) if sampling.penalised and not pending else (),
        banned=ends if index < sampling.min_tokens else frozenset(),
    )
