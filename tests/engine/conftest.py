"""Running the engine by hand: pools, tables and prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import NO_BLOCK, Batch, Draw, Drawn, Row
from diptych.engine.engine import Engine
from diptych.engine.prepared import open_prepared
from diptych.engine.weights import TORCH_DTYPE

BLOCK = 16
GREEDY = SamplingParams(temperature=0.0)


class Bench:
    """An engine with a pool, and sequences whose blocks lie scattered in it."""

    def __init__(self, directory: Path, *, kv_tokens: int = 2048, slots: int = 8, seed: int = 0) -> None:
        self.model = open_prepared(directory)
        self.layout = self.model.card.layout(block_size=BLOCK, kv_tokens=kv_tokens)
        dtype = TORCH_DTYPE[self.model.card.dtype]
        self.caches = [
            [torch.zeros(count, group.kv_heads, 2, BLOCK, group.head_dim, dtype=dtype) for _ in group.layers]
            for group, count in zip(self.layout.groups, self.layout.num_blocks, strict=True)
        ]
        self.engine = Engine(self.model, self.caches, block_size=BLOCK, max_slots=slots)
        order = random.Random(seed)
        self.free = [order.sample(range(count), count) for count in self.layout.num_blocks]
        self.steps = 0

    def table(self, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Fresh blocks for a sequence of `tokens`, in every group."""
        return tuple(tuple(free.pop() for _ in range(-(-tokens // BLOCK))) for free in self.free)

    def step(self, *rows: Row, on_layer=None, copies=()) -> tuple[Drawn | None, ...]:
        """The first token drawn from each row."""
        return tuple(drawn[0] if drawn else None for drawn in self.run(*rows, on_layer=on_layer, copies=copies))

    def run(self, *rows: Row, on_layer=None, copies=()) -> tuple[tuple[Drawn, ...], ...]:
        batch = self.batch(*rows, copies=copies)
        output = self.engine.run(batch, on_layer)
        assert output.step == batch.step
        return output.drawn

    def batch(self, *rows: Row, copies=()) -> Batch:
        """The next step."""
        self.steps += 1
        return Batch(self.steps - 1, rows, copies)

    def prefill(self, tokens: Sequence[int], tables, *, chunk: int = 10_000, start: int = 0, slot: int = 0, sampling=GREEDY) -> Drawn:
        """Compute a prompt in chunks from position `start`; the token drawn after it."""
        drawn: Drawn | None = None
        for at in range(start, len(tokens), chunk):
            stop = min(at + chunk, len(tokens))
            draws = (Draw(sampling, 0),) if stop == len(tokens) else ()
            (drawn,) = self.step(Row(slot, at, tuple(tokens[at:stop]), self.passed(tables, at), draws))
        assert drawn is not None
        return drawn

    def decode(self, length: int, count: int, tables, *, slot: int = 0, sampling=GREEDY) -> Iterator[Drawn]:
        """`count` tokens after the `length` tokens computed; the first token is taken from the slot."""
        for i in range(count):
            row = Row(slot, length + i, (), self.passed(tables, length + i), (Draw(sampling, i + 1),))
            yield self.step(row)[0]

    def generate(self, tokens: Sequence[int], count: int, *, chunk: int = 10_000, sampling=GREEDY) -> list[Drawn]:
        tables = self.table(len(tokens) + count)
        first = self.prefill(tokens, tables, chunk=chunk, sampling=sampling)
        return [first, *self.decode(len(tokens), count - 1, tables, sampling=sampling)]

    def passed(self, tables, position: int) -> tuple[tuple[int, ...], ...]:
        """The tables as a scheduler would give them: blocks that have left the window are NO_BLOCK."""
        return tuple(
            tuple(NO_BLOCK if i < group.first_needed(position) // BLOCK else block for i, block in enumerate(table))
            for group, table in zip(self.layout.groups, tables, strict=True)
        )


@pytest.fixture(scope="session")
def bench() -> type[Bench]:
    return Bench


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """A random prompt of a length, from a seed; begins with <bos>."""

    def make(length: int, *, seed: int = 0, vocab: int = 512) -> list[int]:
        order = random.Random(seed)
        return [2, *(order.randrange(3, vocab) for _ in range(length - 1))]

    return make
