"""Decode steps that are captured once and replayed: a step's launches, some ten a layer, become one.

Shapes are few (decode_shapes.py). A step's inputs are written in host memory, where those of the step before still are, and go in one copy
to the place that the captured step reads. Rows that fill the shape compute token 0 at position 0 of a scratch block, which no sequence has,
and nothing is drawn from them. The shapes share one memory pool: on the device one step is over when the next begins.

What is captured, and how, is `Capture`'s affair: CUDA graphs on a GPU (cuda_capture.py); `run_again`, which captures nothing, is the same
code step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from ..core.layout import CacheGroup
from .batch import Row
from .decode_inputs import DecodeInputs, decodes
from .decode_shapes import DecodeShape, shape_for
from .inputs import Inputs
from .marks import Mark, new_mark

Replay = Callable[[], Tensor]
"""Compute what was captured, over what its memory holds now; the result's own memory is that of every replay."""
Capture = Callable[[Callable[[], Tensor]], Replay]
Forward = Callable[[Inputs], Tensor]
"""A step: logits [rows, vocab]."""


def run_again(run: Callable[[], Tensor]) -> Replay:
    """`Capture` without capturing."""
    return run


@dataclass(frozen=True, slots=True)
class _Captured:
    """here: the inputs in this host's memory, by turns, each with a mark behind its copy: one is filled while the other may still be on its
    way. there: the memory that the step reads."""

    here: Iterator[tuple[DecodeInputs, Mark]]
    there: Tensor
    replay: Replay


@dataclass(frozen=True, slots=True)
class Step:
    """A step whose inputs are on their way to where it reads them."""

    replay: Replay
    rows: int

    def logits(self) -> Tensor:
        """[rows, vocab], until the next step begins."""
        return self.replay()[: self.rows]


class DecodeGraphs:
    """Captured when made: it takes the caches' memory as it is then."""

    def __init__(
        self,
        forward: Forward,
        groups: Sequence[CacheGroup],
        shapes: tuple[DecodeShape, ...],
        *,
        block_size: int,
        scratch: Sequence[int],
        device: torch.device,
        capture: Capture,
        captured: Callable[[int], None],
    ) -> None:
        """`scratch[g]`: the block of group g that is nobody's. `captured` is told how many of `shapes` are done, after each."""
        self._shapes = shapes
        self._fill = Row(slot=0, start=0, token_ids=(0,), tables=tuple((block,) for block in scratch))
        self._steps: dict[DecodeShape, _Captured] = {}
        self._forward = forward
        self._logits: Tensor | None = None
        for shape in shapes:
            both = [
                DecodeInputs(groups, block_size=block_size, rows=shape.rows, context=shape.context, pinned=device.type == "cuda")
                for _ in range(2)
            ]
            both[0].fill([self._fill] * shape.rows, ())
            there = torch.empty(both[0].whole.shape, dtype=torch.int64, device=device).copy_(both[0].whole)
            replay = capture(partial(self._drawn_from, both[0].cut(there, shape.rows)))
            self._steps[shape] = _Captured(cycle([(each, new_mark(device)) for each in both]), there, replay)
            captured(len(self._steps))

    def _drawn_from(self, inputs: Inputs) -> Tensor:
        """The logits, in memory that all shapes have in common. With memory of its own for each the shapes up to 256 rows would hold 5,404
        rows of them, 1.4 GB of 128,256 ids in bfloat16, most of which no rehearsal of the largest few shows."""
        logits = self._forward(inputs)
        if self._logits is None or len(self._logits) < len(logits):  # once, as the largest shape comes first
            self._logits = torch.empty_like(logits)
        return self._logits[: len(logits)].copy_(logits)

    def step(self, rows: Sequence[Row], last_drawn: Sequence[int]) -> Step | None:
        """The step of these rows; None if they are not all decodes, or no shape has room for them."""
        shape = shape_for(self._shapes, len(rows), 1 + max([row.start for row in rows])) if decodes(rows) else None
        if shape is None:
            return None
        step = self._steps[shape]
        here, sent = next(step.here)
        sent.synchronize()  # what was in it two steps of this shape ago
        here.fill((*rows, *[self._fill] * (shape.rows - len(rows))), last_drawn)
        step.there.copy_(here.whole, non_blocking=True)  # the device makes it behind the step before, which reads it
        sent.record()
        return Step(step.replay, len(rows))
