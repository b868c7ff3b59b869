"""The engine: runs one batch after another. It knows no request, only rows, slots and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.sampling import SamplingParams
from ..kernels.penalties import Seen
from .batch import Batch, Draw, Drawn, Row, StepOutput
from .decoder import LoadedDecoder
from .inputs import make_inputs
from .prepared import PreparedModel
from .sampler import sample


class Engine:
    """One model over one KV pool. Not thread-safe: batches run one after another, in the order of their steps."""

    def __init__(self, model: PreparedModel, caches: Sequence[Sequence[Tensor]], *, block_size: int, max_slots: int) -> None:
        """`caches[g][i]`: [num_blocks, kv_heads, 2, block_size, head_dim] of layer `card.cache_groups()[g].layers[i]`.

        A row's slot is below `max_slots`.
        """
        self._groups = model.card.cache_groups()
        self._block_size = block_size
        self._dtype = model.tensors["embed"].dtype
        self._decoder = LoadedDecoder(model.card, model.tensors, caches)
        self._last_drawn = [0] * max_slots
        self._seen: list[Seen | None] = [None] * max_slots

    @torch.inference_mode()
    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepOutput:
        """Compute `batch`, store its KV, draw what its rows ask for; returns when all is done.

        `on_layer(layer)` is called right after a layer's KV is stored. A row without token ids reads the token last drawn in
        its slot, so a batch may be decided before the one before it is done.
        """
        inputs = make_inputs(batch.rows, self._last_drawn, self._groups, block_size=self._block_size, dtype=self._dtype)
        logits = self._decoder.logits(inputs, on_layer)
        drawing = [row for row in batch.rows if row.draw]
        drawn: dict[int, Drawn] = {}
        if logits is not None:
            draws = [row.draw for row in drawing if row.draw]
            seen = [self._seen_before(row.slot, draw) for row, draw in zip(drawing, draws, strict=True)]
            drawn = {row.slot: each for row, each in zip(drawing, sample(logits, draws, seen), strict=True)}
        for slot, each in drawn.items():
            self._last_drawn[slot] = each.token_id
        return StepOutput(batch.step, tuple(drawn[row.slot] if row.draw else None for row in batch.rows))

    def _seen_before(self, slot: int, draw: Draw) -> Seen | None:
        """What the penalties of `draw` count. Called before anything is drawn in this step: the slot still holds the token before."""
        seen = None
        if draw.history:
            seen = Seen(draw.history, draw.index)
        elif draw.sampling.penalised:
            seen = self._seen[slot]
            assert seen is not None, "a history comes with the first draw in a slot"
            seen.add(self._last_drawn[slot])
        self._seen[slot] = seen
        return seen

    def warm_up(self) -> None:
        """Touch every weight and every kind of step once. Overwrites block 0 of every group: call it before serving."""
        tables = ((0,),) * len(self._groups)
        draw = Draw(SamplingParams(temperature=1.0, top_k=1, seed=0), index=0)
        prompt = Row(slot=0, start=0, token_ids=(0,) * (self._block_size - 1), tables=tables, draw=draw)
        self.run(Batch(step=-2, rows=(prompt,)))
        self.run(Batch(step=-1, rows=(Row(slot=0, start=self._block_size - 1, token_ids=(), tables=tables, draw=draw),)))
        self._last_drawn[0] = 0
