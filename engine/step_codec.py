"""Batches and their outputs as bytes: what the leader of a worker tells its ranks each step, and what the one that draws answers.

Little-endian. Numbers in a row are their count and 32 bits each; of a table the blocks that have left the window are only counted. What
a sampling asks for is the same step after step: each distinct one is made into bytes, and back, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import lru_cache
from itertools import repeat
from struct import Struct, pack, unpack_from
from typing import Any, TypeVar

from ..core.sampling import SamplingParams
from .batch import NO_BLOCK, Batch, BlockCopy, Draw, Drawn, Row, StepOutput

T = TypeVar("T")

_COUNT = Struct("<I")
_STEP = Struct("<q")
_OUTPUT = Struct("<q?")  # step, eager
_ROW = Struct("<II")  # slot, start
_COPY = Struct("<III")  # group, source, destination
_DRAW = Struct("<II")  # index, choice
_DRAWN = Struct("<I?d")  # token, whether there is a log-probability, the log-probability
_TOP = Struct("<Id")  # token, log-probability


def encode_batch(batch: Batch) -> bytes:
    """`decode_batch` is the exact inverse."""
    copies = [_COPY.pack(copy.group, copy.source, copy.destination) for copy in batch.copies]
    return _STEP.pack(batch.step) + _each(copies) + _each(map(_row, batch.rows))


def encode_output(output: StepOutput) -> bytes:
    """`decode_output` is the exact inverse."""
    return _OUTPUT.pack(output.step, output.eager) + _each(_each(map(_drawn, drawn)) for drawn in output.drawn)


def decode_batch(data: bytes) -> Batch:
    """`struct.error` if the bytes end early."""
    reader = _Reader(data)
    (step,) = reader.take(_STEP)
    copies = reader.each(lambda: BlockCopy(*reader.take(_COPY)))
    return Batch(step, reader.each(reader.row), copies)


def decode_output(data: bytes) -> StepOutput:
    """`struct.error` if the bytes end early."""
    reader = _Reader(data)
    step, eager = reader.take(_OUTPUT)
    return StepOutput(step, reader.each(lambda: reader.each(reader.drawn)), eager)


def _each(parts: Iterable[bytes]) -> bytes:
    listed = list(parts)
    return _COUNT.pack(len(listed)) + b"".join(listed)


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return pack(f"<I{len(numbers)}I", len(numbers), *numbers)


def _row(row: Row) -> bytes:
    tables, draws = _each(map(_table, row.tables)), _each(map(_draw, row.draws))
    return _ROW.pack(row.slot, row.start) + _numbers(row.token_ids) + tables + draws


def _table(table: tuple[int, ...]) -> bytes:
    passed = table.count(NO_BLOCK)  # they are the first ones; elsewhere one would not be a number to pack
    return _COUNT.pack(passed) + _numbers(table[passed:])


def _draw(draw: Draw) -> bytes:
    said = _numbers(draw.history) + _numbers(tuple(sorted(draw.banned)))
    return _DRAW.pack(draw.index, draw.choice) + said + _sampling(draw.sampling)


@lru_cache(maxsize=1024)
def _sampling(sampling: SamplingParams) -> bytes:
    """What differs from the defaults, as JSON, which keeps every bit of a number."""
    said = {field.name: getattr(sampling, field.name) for field in fields(sampling) if getattr(sampling, field.name) != field.default}
    text = json.dumps(said).encode()
    return _COUNT.pack(len(text)) + text


@lru_cache(maxsize=1024)
def _sampling_of(text: bytes) -> SamplingParams:
    return SamplingParams(**{name: _frozen(value) for name, value in json.loads(text).items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _drawn(drawn: Drawn) -> bytes:
    said = drawn.logprob is not None
    return _DRAWN.pack(drawn.token_id, said, drawn.logprob or 0.0) + _each(_TOP.pack(*each) for each in drawn.top)


class _Reader:
    """Takes one thing after another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, what: Struct) -> tuple[Any, ...]:
        taken = what.unpack_from(self._data, self._at)
        self._at += what.size
        return taken

    def each(self, take: Callable[[], T]) -> tuple[T, ...]:
        (count,) = self.take(_COUNT)
        return tuple(take() for _ in range(count))

    def numbers(self) -> tuple[int, ...]:
        (count,) = self.take(_COUNT)
        numbers = unpack_from(f"<{count}I", self._data, self._at)
        self._at += 4 * count
        return numbers

    def row(self) -> Row:
        slot, start = self.take(_ROW)
        return Row(slot, start, self.numbers(), self.each(self.table), self.each(self.draw))

    def table(self) -> tuple[int, ...]:
        (passed,) = self.take(_COUNT)
        return (*repeat(NO_BLOCK, passed), *self.numbers())

    def draw(self) -> Draw:
        index, choice = self.take(_DRAW)
        history, banned = self.numbers(), frozenset(self.numbers())
        (length,) = self.take(_COUNT)
        text = self._data[self._at : self._at + length]
        self._at += length
        return Draw(_sampling_of(text), index, choice, history, banned)

    def drawn(self) -> Drawn:
        token, said, logprob = self.take(_DRAWN)
        return Drawn(token, logprob if said else None, self.each(self.top))

    def top(self) -> tuple[int, float]:
        token, logprob = self.take(_TOP)
        return token, logprob
