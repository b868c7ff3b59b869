"""Steps of the engine alone, timed in a process of its own that keeps to the cores it is given, as a rank's engine does."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ...core.errors import Unavailable
from ...core.sampling import SamplingParams
from ...engine.batch import Batch, Draw, Row
from ...engine.engine import Engine
from ...engine.prepared import PreparedModel, open_prepared
from ...engine.weights import TORCH_DTYPE
from ..process.spec import BLOCK_SIZE
from ..programs.lent_cores import compute_on

PREFILLS = ((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (2, 256), (4, 64), (4, 128), (8, 32))
"""Batch and length."""
DECODES = (
    (1, 16), (1, 512), (1, 1024), (2, 256), (4, 16), (4, 512), (8, 16), (8, 256),
    (9, 256), (12, 16), (16, 16), (16, 256), (32, 16), (32, 128),
)  # fmt: skip
"""Batch and tokens attended to."""
BOTH = ((1, 256), (4, 256), (8, 256), (16, 256))
"""Batch and tokens attended to, beside a prompt's chunk."""
CHUNK, CHUNK_START = 64, 128
"""Of that prompt: `decode.chunk_tokens` by default, behind so many."""
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was timed (`what`: prefill, decode or both): the median of its runs, in seconds."""

    what: str
    batch: int
    length: int
    seconds: float


ROWS = (1, 8)
"""Answers at once of which it is measured what serving adds."""
AGAIN = (("prefill", 1, 256), *(("decode", rows, 16) for rows in ROWS))
"""What is timed again, to know how fast the machine is by then; all of it is in the grid."""


def grid(max_context: int) -> list[tuple[str, int, int]]:
    """What is timed on each number of cores."""
    kinds = (("prefill", PREFILLS), ("decode", DECODES), ("both", BOTH))
    return [(what, batch, length) for what, pairs in kinds for batch, length in pairs if length < max_context]


def timed_steps(model_dir: Path, cores: Sequence[int], repeats: int, steps: Sequence[tuple[str, int, int]] | None = None) -> Iterator[Step]:
    """Each as it has been timed: `steps`, or the whole grid. `Unavailable` if the process that computes ends before its end."""
    ear, mouth = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(
        target=_time_all, args=(mouth, model_dir, tuple(cores), repeats, steps), daemon=True
    )
    child.start()
    mouth.close()
    try:
        while (step := ear.recv()) is not None:
            yield step
        child.join()
    except EOFError:
        child.join()
        raise Unavailable(f"The process that timed steps on {len(cores)} cores ended ({child.exitcode}) before it was through.") from None
    finally:
        if child.is_alive():
            child.kill()
            child.join()


def _time_all(pipe: Connection, model_dir: Path, cores: Sequence[int], repeats: int, steps: Sequence[tuple[str, int, int]] | None) -> None:
    compute_on(cores)
    model = open_prepared(model_dir)
    steps = steps or grid(model.card.max_context)
    timed = _Timed(model, steps)
    for what, batch, length in steps:
        run = {"prefill": timed.prefill, "decode": timed.decode, "both": timed.both}[what]
        pipe.send(Step(what, batch, length, _median(partial(run, batch, length), repeats)))
    pipe.send(None)


class _Timed:
    """An engine and blocks for the largest batch of `steps`."""

    def __init__(self, model: PreparedModel, steps: Sequence[tuple[str, int, int]]) -> None:
        tokens = max(batch * (length + BLOCK_SIZE) for _, batch, length in steps)
        layout = model.card.layout(block_size=BLOCK_SIZE, kv_tokens=tokens)
        shapes = [
            (group, (blocks, group.kv_heads, 2, BLOCK_SIZE, group.head_dim))
            for group, blocks in zip(layout.groups, layout.num_blocks, strict=True)
        ]
        caches = [[torch.zeros(shape, dtype=TORCH_DTYPE[model.card.dtype]) for _ in group.layers] for group, shape in shapes]
        self._engine = Engine(model, caches, block_size=BLOCK_SIZE, max_slots=max(batch for _, batch, _ in steps))
        draw = random.Random(0)
        self._scattered = [draw.sample(range(blocks), blocks) for blocks in layout.num_blocks]
        self._ids = tuple(draw.randrange(3, model.card.vocab_size) for _ in range(max(length for _, length in PREFILLS)))
        self._engine.warm_up()

    def prefill(self, batch: int, length: int) -> None:
        self._run(batch, length, 0, self._ids[:length])

    def decode(self, batch: int, context: int) -> None:
        self._run(batch, context, context - 1, self._ids[:1])

    def both(self, batch: int, context: int) -> None:
        stop, ids = CHUNK_START + CHUNK, self._ids[:CHUNK]
        chunk = Row(batch, CHUNK_START, ids, self._tables(batch * context, stop))
        self._engine.run(Batch(0, (*self._rows(batch, context, context - 1, self._ids[:1]), chunk)))

    def _run(self, batch: int, length: int, start: int, ids: tuple[int, ...]) -> None:
        self._engine.run(Batch(0, self._rows(batch, length, start, ids)))

    def _rows(self, batch: int, length: int, start: int, ids: tuple[int, ...]) -> tuple[Row, ...]:
        tables = (self._tables(slot * length, length) for slot in range(batch))
        return tuple(Row(slot, start, ids, each, (Draw(GREEDY, 0),)) for slot, each in enumerate(tables))

    def _tables(self, before: int, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Blocks for so many tokens, behind those for `before`."""
        first, count = -(-before // BLOCK_SIZE), -(-tokens // BLOCK_SIZE)
        return tuple(tuple(row[first : first + count]) for row in self._scattered)


def _median(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
