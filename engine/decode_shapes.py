"""The shapes that decode steps are captured in: so many rows, contexts up to so many tokens. A step takes the least with room for it."""

from __future__ import annotations

from dataclasses import dataclass

COUNTS = (1, 2, 4, *range(8, 65, 8), *range(96, 257, 32))
"""Rows: of those a step computes at most 7 for nothing up to 64, and then at most a third; reading the weights is most of such a step.
Larger batches gain little: their kernels take longer than their launches."""
LEAST_CONTEXT = 2048
TIMES = 4
"""From one context to the next. How keys are split among a GPU's cores follows from how long tables are, not from how much of them is in
use: with one shape for 131,072 tokens a context of 1,000 would be left to one of a hundred programs."""


@dataclass(frozen=True, slots=True, order=True)
class DecodeShape:
    """Up to `rows` rows at positions below `context`."""

    rows: int
    context: int


def decode_shapes(rows: int, context: int) -> tuple[DecodeShape, ...]:
    """All shapes for steps of up to `rows` rows, or the most that is captured, and positions below `context`; the largest first: what is
    captured after it fits into the memory that it took."""
    counts = {min(count, rows) for count in COUNTS if count < 2 * rows}
    contexts = [LEAST_CONTEXT]
    while contexts[-1] < context:
        contexts.append(contexts[-1] * TIMES)
    contexts[-1] = min(contexts[-1], context)
    return tuple(sorted((DecodeShape(count, each) for count in counts for each in contexts), reverse=True))


def shape_for(shapes: tuple[DecodeShape, ...], rows: int, context: int) -> DecodeShape | None:
    """The least of `shapes` with room for `rows` rows at positions below `context`; None if there is none."""
    fitting = [shape for shape in shapes if shape.rows >= rows and shape.context >= context]
    return min(fitting, default=None)
