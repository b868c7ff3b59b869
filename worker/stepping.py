"""One step at all ranks of a worker: told to the followers, run here, complete when every rank has run its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from threading import Lock
from typing import Protocol

from ..core.recordings import Doing
from ..core.spans import span
from ..engine.batch import Batch, StepOutput
from ..engine.last_drawn import LastDrawn
from ..engine.step_codec import decode_batch, decode_output, encode_batch, encode_output
from .channel import Kind
from .loop import OnLayer, Ran

STORED = Struct("<qI")
"""A step, and the layer whose KV is stored."""
TELL_LAYERS = b"\1"


class StepEngine(Protocol):
    """What a rank needs of its `engine.engine.Engine`."""

    last_drawn: LastDrawn

    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepOutput: ...


@dataclass(slots=True)
class _Step:
    """One in flight. `unfinished`: how many ranks have still to run their part."""

    batch: Batch
    on_layer: OnLayer | None
    ran: Ran
    unfinished: int
    output: StepOutput


class Steps:
    """The leader's. `run` is called on the engine's thread, `heard` on those of the channels."""

    def __init__(self, engine: StepEngine, tell_all: Callable[[Kind, bytes], None], *, ranks: int, drawing: int) -> None:
        """`tell_all` sends to every follower. `drawing`: the rank that draws, shard 0 of the last stage."""
        self._engine, self._tell_all, self._ranks, self._drawing = engine, tell_all, ranks, drawing
        self._in_flight: dict[int, _Step] = {}
        self._lock = Lock()

    def run(self, batch: Batch, on_layer: OnLayer | None, ran: Ran) -> None:
        """`worker.loop.RunStep`. What the batch's rows were drawn before must be known: with one stage it is, since this rank draws."""
        batch = self._engine.last_drawn.resolve(batch)
        self._in_flight[batch.step] = _Step(batch, on_layer, ran, self._ranks, StepOutput(batch.step, ()))
        with span(Doing.TELL_RANKS, batch.step):
            self._tell_all(Kind.STEP, (TELL_LAYERS if on_layer else b"\0") + encode_batch(batch))
        self._part_done(0, self._engine.run(batch, on_layer))

    def heard(self, rank: int, kind: Kind, payload: bytes) -> None:
        """A follower's STORED or RAN."""
        if kind is Kind.RAN:
            self._part_done(rank, decode_output(payload))
            return
        step, layer = STORED.unpack(payload)
        on_layer = self._in_flight[step].on_layer
        assert on_layer is not None, "nobody asked for layers"
        on_layer(layer, rank)

    def _part_done(self, rank: int, output: StepOutput) -> None:
        with self._lock:  # the loop is told of steps in their order
            step = self._in_flight[output.step]
            step.unfinished -= 1
            if rank == self._drawing:
                step.output = output
                if rank:  # else the engine here has noted it, and may be at the step behind
                    self._engine.last_drawn.note(step.batch, output)
            if not step.unfinished:
                del self._in_flight[output.step]
                step.ran(step.output)


class Part:
    """A follower's."""

    def __init__(self, engine: StepEngine, send: Callable[[Kind, bytes], None], *, draws: bool) -> None:
        self._engine, self._send, self._draws = engine, send, draws

    def run(self, payload: bytes) -> None:
        """What the leader's STEP asks for."""
        batch = decode_batch(payload[1:])

        def stored(layer: int) -> None:
            self._send(Kind.STORED, STORED.pack(batch.step, layer))

        output = self._engine.run(batch, stored if payload[:1] == TELL_LAYERS else None)
        self._send(Kind.RAN, encode_output(output if self._draws else StepOutput(batch.step, ())))
