"""The engine: runs one batch after another. It knows no request, only rows, slots and blocks.

On a GPU nothing of a step waits for it: `launch` asks for all of it, what was drawn goes to the next step there, and comes to this host by
a copy that is waited for when the step's output is. What the host writes for a step is in memory that nothing earlier still reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.model import ForeignDecoder
from ..core.recordings import Doing
from ..core.sampling import SamplingParams
from ..core.spans import span
from ..kernels.attend_singles import fits
from ..kernels.block_copy import copy_blocks
from ..kernels.penalties import Seen
from ..kernels.sent import sent
from .batch import Batch, BlockCopy, Draw, Row, StepOutput
from .decode_graphs import Capture, DecodeGraphs, Step
from .decode_inputs import DecodeInputs, decodes
from .decode_shapes import DecodeShape
from .decoder import LoadedDecoder
from .drawn_there import DrawnThere
from .foreign import TransformersDecoder
from .inputs import CPU, Inputs, make_inputs
from .last_drawn import LastDrawn
from .marks import arriving
from .parallel import Parallel
from .placing import Upload
from .prepared import PreparedModel
from .sampler import Sampled, sample
from .weights import TORCH_DTYPE


class Engine:
    """One model over one KV pool. Not thread-safe: batches run one after another, in the order of their steps."""

    def __init__(
        self,
        model: PreparedModel,
        caches: Sequence[Sequence[Tensor]],
        *,
        block_size: int,
        max_slots: int,
        parallel: Parallel | None = None,
        device: torch.device = CPU,
    ) -> None:
        """`caches[g][i]`: [num_blocks, kv_heads, 2, block_size, head_dim] of layer `groups[g].layers[i]`, on `device`, where `groups` are
        `parallel.groups`, or those of the card if this is a worker of one rank (`parallel` None).

        A row's slot is below `max_slots`.
        """
        alone = Parallel(model.card.layout(block_size=block_size, kv_tokens=block_size))
        self._groups = (parallel or alone).groups
        self._upload = Upload(device)
        self._block_size = block_size
        self._dtype = TORCH_DTYPE[model.card.dtype]
        self._decoder: LoadedDecoder | TransformersDecoder
        if isinstance(model.card.decoder, ForeignDecoder):
            self._decoder = TransformersDecoder(model.card, model.tensors, device)
        else:
            self._decoder = LoadedDecoder(model.card, model.tensors, parallel or alone, self._upload)
        self._upload.release()
        self.hold(caches)
        self._kept: DecodeInputs | None = None
        self.last_drawn = LastDrawn(max_slots)
        """What this host knows. On a GPU a step reads `_there`, and `_last` has names for what is there."""
        self._there = None if device.type == "cpu" else DrawnThere(max_slots, device)
        self._last: Sequence[int] = self.last_drawn.tokens if self._there is None else self._there.names
        self._seen: list[Seen | None] = [None] * max_slots

    def hold(self, caches: Sequence[Sequence[Tensor]], stored: Callable[[int], None] | None = None) -> None:
        """Compute over these caches from now on; what was stored in others is forgotten, and what was captured. `stored(layer)` is called
        when the device has been asked for all stores of a layer's KV, and need not have made them."""
        self._caches, self._stored = caches, stored
        self._decoder.hold(caches)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture(self, shapes: tuple[DecodeShape, ...], capture: Capture, captured: Callable[[int], None]) -> None:
        """Steps of decodes alone that fit one of `shapes` are replayed from now on. The last block of every group is then the engine's own.
        `captured` is told after each how many are done. In a worker of one rank, where attention gathers nothing; `RuntimeError` if the
        device cannot capture a step."""

        def forward(inputs: Inputs) -> Tensor:
            logits = self._decoder.logits(self._filled(inputs), None)
            assert logits is not None, "this rank draws"
            return logits

        self._graphs = DecodeGraphs(
            forward,
            self._groups,
            shapes,
            block_size=self._block_size,
            scratch=[len(each[0]) - 1 if each else 0 for each in self._caches],
            device=self._upload.device,
            capture=capture,
            captured=captured,
        )

    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepOutput:
        """`launch`, and wait for the output."""
        return self.launch(batch, on_layer)()

    @torch.inference_mode()
    def launch(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> Callable[[], StepOutput]:
        """Copy the blocks `batch` names, compute its rows, store their KV, draw what they ask for. On a CPU all is done when this returns;
        a GPU has then been asked for it, behind what it was asked for before. What is returned waits for the output: to be called once,
        on any thread, of one step after another; in a worker of many ranks before the next step.

        `on_layer(layer)` is called right after a layer's KV is stored, or on a GPU when that is asked for: whoever reads it has to wait for
        what `stored` noted. A row without token ids reads the token last drawn in
        its slot, so a batch may be decided, and launched, before the one before it is done.

        Of a worker of many ranks each runs the same batches, resolved by the leader's `last_drawn`; shard 0 of the last stage draws,
        and every other rank's output is empty. `Unavailable` names the ranks that take no part.
        """
        device = self._upload.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: Triton launches there, whatever device its tensors are on
        if batch.copies:
            with span(Doing.COPY_BLOCKS, batch.step):
                self._copy(batch.copies)
        with span(Doing.INPUTS, batch.step):
            step = None if self._graphs is None or on_layer is not None else self._graphs.step(batch.rows, self._last)
            inputs = self.inputs_of(batch.rows) if step is None else None
        with span(Doing.FORWARD, batch.step):
            logits = self._logits(step, inputs, on_layer)
        sampled = self._sampled(batch, logits)
        arrived = arriving(sampled.numbers, batch.step)
        eager = step is None and on_layer is None and device.type == "cuda" and decodes(batch.rows)
        output = partial(self._output, batch, sampled, arrived, eager)
        if self._there is not None:
            return output
        done = output()
        return lambda: done

    def _sampled(self, batch: Batch, logits: Tensor | None) -> Sampled:
        if logits is None:
            nothing = torch.empty(0, dtype=torch.int64, device=self._upload.device)
            return Sampled(nothing, nothing, ())
        drawing = [row for row in batch.rows if row.draws]
        with span(Doing.SAMPLE, batch.step):
            sampled = sample(logits, [row.draws for row in drawing], [self._seen_before(row) for row in drawing])
            if self._there is not None:
                self._there.note(drawing, sampled.tokens)
        return sampled

    def _output(self, batch: Batch, sampled: Sampled, arrived: Callable[[], list[Any]], eager: bool) -> StepOutput:
        answers = iter(sampled.drawn(arrived()))
        output = StepOutput(batch.step, tuple([next(answers, ()) if row.draws else () for row in batch.rows]), eager)
        self.last_drawn.note(batch, output)
        return output

    def inputs_of(self, rows: Sequence[Row]) -> Inputs:
        """Where the model is computed. Of decodes alone on a CPU what stays the same is not made again."""
        device = self._upload.device
        if decodes(rows) and all(fits(self._dtype, group.head_dim, device) for group in self._groups):
            return self._kept_inputs(rows)
        return self._upload.batch(
            make_inputs(rows, self._last, self._groups, block_size=self._block_size, dtype=self._dtype, device=device)
        )

    def _kept_inputs(self, rows: Sequence[Row]) -> Inputs:
        kept, context = self._kept, 1 + max([row.start for row in rows])
        if kept is None or kept.context < context:
            kept = self._kept = DecodeInputs(self._groups, block_size=self._block_size, rows=len(self._seen), context=2 * context)
        kept.fill(rows, self._last)
        return kept.inputs(len(rows))

    def _logits(self, step: Step | None, inputs: Inputs | None, on_layer: Callable[[int], None] | None) -> Tensor | None:
        if step is not None:
            return step.logits()
        assert inputs is not None
        return self._decoder.logits(self._filled(inputs), on_layer and partial(self._layer_stored, on_layer))

    def _filled(self, inputs: Inputs) -> Inputs:
        return inputs if self._there is None else self._there.filled(inputs)

    def _layer_stored(self, on_layer: Callable[[int], None], layer: int) -> None:
        with span(Doing.ANNOUNCE):
            if self._stored is not None:
                self._stored(layer)
            on_layer(layer)

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        for g, caches in enumerate(self._caches):
            pairs = [(each.source, each.destination) for each in copies if each.group == g]
            if pairs:
                sources, destinations = sent(torch.tensor(pairs), self._upload.device).unbind(1)
                for cache in caches:
                    copy_blocks(cache, sources, destinations)

    def _seen_before(self, row: Row) -> list[Seen | None]:
        """What the penalties of the row's draws count. Called before anything is drawn in this step: the slot still holds the token
        before. The slot goes on with what the first draw counts."""
        seen = [self._seen_by(row.slot, draw) for draw in row.draws]
        self._seen[row.slot] = seen[0]
        return seen

    def _seen_by(self, slot: int, draw: Draw) -> Seen | None:
        if draw.history:
            return Seen(draw.history, draw.index, self._upload.device)
        if not draw.sampling.penalised:
            return None
        seen = self._seen[slot]
        assert seen is not None, "a history comes with the first draw in a slot"
        if self._there is None:
            seen.add(self.last_drawn.tokens[slot])
        else:
            seen.add_there(self._there.of(slot))
        return seen

    def warm_up(self, *, tokens: int | None = None, context: int | None = None, rows: int = 1) -> None:
        """Touch every weight and every kind of step once, at all ranks: `tokens` positions (by default a block less one) of a sequence that
        ends at position `context`, then one position of each of `rows` sequences. Overwrites block 0 of every group, which is all it
        takes: call it before serving."""
        tokens = tokens or self._block_size - 1
        context = max(context or 0, tokens)
        table = (0,) * -(-(context + 1) // self._block_size)
        tables = (table,) * len(self._groups)
        draws = (Draw(SamplingParams(temperature=1.0, top_k=1, seed=0), index=0),)
        self.run(Batch(-2, (Row(0, context - tokens, (0,) * tokens, tables, draws),)))
        self.run(Batch(-1, tuple(Row(slot, tokens, (0,), tables, draws) for slot in range(rows))))
        if self._there is not None:
            self._launch_the_rest()

    def _launch_the_rest(self) -> None:
        """What those steps have no use for: draws without limits and with all of them, draws from changed logits (in fp32), and attention
        to few keys. On a GPU each kernel is compiled when a host first launches it, for a second or two in which all answers would stand
        still; limits by themselves launch no others than all of them together."""
        table = ((0,),) * len(self._groups)
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (1, 0.5, 0.5)):
            for bias in ((), ((0, 0.0),)):
                asked = SamplingParams(temperature=1.0, seed=0, top_k=top_k, top_p=top_p, min_p=min_p, logit_bias=bias)
                draws = (Draw(asked, index=0),)
                self.run(Batch(-1, (Row(0, 1, (0,), table, draws),)))
