"""A step at the leader and at its followers: complete when all have run it, told of in order, whoever is fast."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Batch, Draw, Drawn, Row, StepOutput
from diptych.engine.last_drawn import LastDrawn
from diptych.engine.step_codec import decode_batch
from diptych.worker.channel import Kind
from diptych.worker.stepping import Part, Steps

DRAW = Draw(SamplingParams(temperature=0.0), 0)


def batch(step: int, *token_ids: int, draws: tuple[Draw, ...] = (DRAW,)) -> Batch:
    """One row in slot 0; without token ids it goes on with the token last drawn there."""
    return Batch(step, (Row(0, 5, token_ids, ((0,),), draws),))


@dataclass
class Engine:
    """Stores two layers, and draws the number of the step where it `draws`."""

    draws: bool
    layers: tuple[int, ...] = (0, 1)
    last_drawn: LastDrawn = field(default_factory=lambda: LastDrawn(1))
    computed: list[Batch] = field(default_factory=list)

    def run(self, batch: Batch, on_layer=None) -> StepOutput:
        self.computed.append(batch)
        for layer in self.layers if on_layer else ():
            on_layer(layer)
        output = StepOutput(
            batch.step, tuple(tuple(Drawn(100 + batch.step) for _ in row.draws) if self.draws else () for row in batch.rows)
        )
        self.last_drawn.note(batch, output)
        return output


class Worker:
    """All ranks in one thread; what followers say waits until a test lets it be heard."""

    def __init__(self, ranks: int, drawing: int) -> None:
        self.engines = [Engine(rank == drawing, (2 * rank, 2 * rank + 1)) for rank in range(ranks)]
        self.said: dict[int, list[tuple[Kind, bytes]]] = {rank: [] for rank in range(1, ranks)}
        self.steps = Steps(self.engines[0], self._tell_all, ranks=ranks, drawing=drawing)
        self.parts = {
            rank: Part(self.engines[rank], lambda *said, rank=rank: self.said[rank].append(said), draws=rank == drawing)
            for rank in self.said
        }
        self.events: list[object] = []

    def run(self, batch: Batch, *, tell_layers: bool = False) -> None:
        self.steps.run(batch, (lambda layer, rank=0: self.events.append((rank, layer))) if tell_layers else None, self.events.append)

    def hear(self, rank: int) -> None:
        self.steps.heard(rank, *self.said[rank].pop(0))

    def _tell_all(self, kind: Kind, payload: bytes) -> None:
        assert kind is Kind.STEP
        for part in self.parts.values():
            part.run(payload)


def test_a_step_is_complete_when_every_rank_has_run_it() -> None:
    worker = Worker(3, drawing=0)
    worker.run(batch(0, 1, 2))
    assert worker.events == []
    worker.hear(2)
    assert worker.events == []
    worker.hear(1)
    assert worker.events == [StepOutput(0, ((Drawn(100),),))]


def test_the_output_is_that_of_the_rank_that_draws() -> None:
    worker = Worker(4, drawing=2)
    worker.run(batch(0, 1, 2))
    for rank in (2, 3, 1):
        worker.hear(rank)
    assert worker.events == [StepOutput(0, ((Drawn(100),),))]


def test_layers_are_told_by_rank_before_the_step_is_complete() -> None:
    worker = Worker(2, drawing=1)
    worker.run(batch(0, 1, 2, draws=()), tell_layers=True)
    for _ in range(3):
        worker.hear(1)
    assert worker.events == [(0, 0), (0, 1), (1, 2), (1, 3), StepOutput(0, ((),))]


def test_nobody_says_which_layers_are_stored_if_nobody_asks() -> None:
    worker = Worker(2, drawing=0)
    worker.run(batch(0, 1, 2))
    assert [kind for kind, _ in worker.said[1]] == [Kind.RAN]


def test_a_leader_that_draws_knows_every_token_for_the_next_step() -> None:
    """Its followers may be late with their RAN."""
    worker = Worker(2, drawing=0)
    for step in range(3):
        worker.run(batch(step, *([1, 2] if step == 0 else [])))
    assert [each.rows[0].token_ids for each in worker.engines[1].computed] == [(1, 2), (100,), (101,)]
    for _ in range(3):
        worker.hear(1)
    worker.run(batch(3))
    assert worker.engines[1].computed[-1].rows[0].token_ids == (102,), "what the followers say of old steps changes nothing"


def test_a_leader_that_does_not_draw_knows_a_token_once_the_step_is_complete() -> None:
    worker = Worker(3, drawing=2)
    worker.run(batch(0, 1, 2))
    worker.hear(2)
    worker.hear(1)
    worker.run(batch(1))
    assert worker.engines[0].computed[-1].rows[0].token_ids == (100,)


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_complete_in_their_order_whoever_is_fast(seed: int) -> None:
    order, worker = random.Random(seed), Worker(4, drawing=2)
    for step in range(12):
        worker.run(batch(step, step + 1))
        for _ in range(order.randrange(6)):
            if ready := [rank for rank, said in worker.said.items() if said]:
                worker.hear(order.choice(ready))
    while ready := [rank for rank, said in worker.said.items() if said]:
        worker.hear(order.choice(ready))
    assert worker.events == [StepOutput(step, ((Drawn(100 + step),),)) for step in range(12)]


def test_followers_compute_the_very_batch() -> None:
    worker = Worker(2, drawing=0)
    sent: list[bytes] = []
    worker.steps._tell_all = lambda kind, payload: sent.append(payload)
    asked = batch(0, 1, 2, 3)
    worker.run(asked)
    assert decode_batch(sent[0][1:]) == asked


def test_a_step_that_fails_here_is_raised_to_the_loop() -> None:
    worker = Worker(2, drawing=0)

    def slip(batch: Batch, on_layer=None) -> StepOutput:
        raise ArithmeticError("slipped")

    worker.engines[0].run = slip  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError):
        worker.run(batch(0, 1))
