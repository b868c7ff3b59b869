"""What a step is asked to draw, and what ends an output. Both schedulers ask in the same way, so that every path draws the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.request import FinishReason
from ..core.sampling import SamplingParams
from ..engine.batch import Draw


def next_draw(
    sampling: SamplingParams, index: int, tokens: Sequence[int], ends: frozenset[int], *, choice: int = 0, pending: bool = False
) -> Draw:
    """Draw output token `index` of `choice` behind `tokens`, prompt and output as far as known; `pending` if more are in flight in the
    row's slot, whose history the engine then has. `ends`: the tokens that end the output."""
    return Draw(
        sampling,
        index,
        choice,
        history=tuple(tokens) if sampling.penalised and not pending else (),
        banned=ends if index < sampling.min_tokens else frozenset(),
    )


def first_finish(
    sampling: SamplingParams, token_id: int, index: int, before: int, ends: frozenset[int], max_context: int
) -> FinishReason | None:
    """Whether a choice's first token, its output token `index` behind `before` tokens, ends it: P says so, and D must think the same."""
    if token_id in ends:
        return FinishReason.STOP
    return FinishReason.LENGTH if index + 1 >= sampling.max_tokens or before + 1 >= max_context else None
