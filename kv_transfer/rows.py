"""Runs as tables of rows: on a GPU thousands of runs are then one kernel, not as many copies.

The runs are those of `geometry`, so what goes where is decided in one place. Runs of equal alignment share a table: a row is as long as the
alignment allows, a whole block's heads at most, and whole blocks are one table, the tokens of the block that ends a prompt another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ..kernels.move_rows import move_rows
from .casting import TOO_LARGE
from .coverage import Span
from .crossing import Crossing
from .geometry import Runs, Table, runs_in
from .pool import DTYPES, Pool

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What is moved at a time, by its bytes: a byte at a time a GPU moves an eighth as much."""

Fits = Tensor | None
"""One truth value on the device, there when the move is done: whether the destination's dtype holds every number. None: it does."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Row `here[i]` of the source, of `length`, becomes row `there[i]` of the destination."""

    length: int
    here: Tensor
    there: Tensor


def rows(runs: Table, most: int, device: torch.device) -> list[Rows]:
    """`runs` in rows of at most `most`."""
    tables: dict[int, Runs] = {}
    for here, there, length in runs_in(runs):
        tables.setdefault(gcd(here, there, length, most), []).append((here, there, length))
    return [_table(unit, found, device) for unit, found in tables.items()]


def _table(unit: int, runs: Runs, device: torch.device) -> Rows:
    firsts = torch.tensor([(here // unit, there // unit, length // unit) for here, there, length in runs]).T
    counts = firsts[2]
    within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    places = torch.repeat_interleave(firsts[:2], counts, dim=1) + within
    if device.type != "cpu":  # from memory that is not pinned the copy would wait for all that the stream was asked for before
        places = places.pin_memory().to(device, non_blocking=True)
    return Rows(unit, places[0], places[1])


def pack_rows(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: Tensor) -> None:
    """As `packing.pack`, on the pool's device; `slot` (uint8) lies there too."""
    tables = rows(crossing.packed(span, blocks), crossing.block(span.group), pool.device)
    for layer, staged in _staged(crossing, span, slot):
        for table in tables:
            _move(pool.whole[pool.geometry.offsets[layer] :], staged, table)


def unpack_rows(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: Tensor) -> Fits:
    """As `packing.unpack`, on the pool's device."""
    pairs = [(staged, pool.whole[pool.geometry.offsets[layer] :]) for layer, staged in _staged(crossing, span, slot)]
    return _carry(crossing, span, crossing.unpacked(span, blocks), pairs)


def copy_rows(source: Tensor, offsets: dict[int, int], into: Pool, crossing: Crossing, span: Span, runs: Table) -> Fits:
    """`runs` of `Crossing.between` from a whole pool `source` (uint8), whose layers begin at `offsets`, into another on the same device."""
    pairs = [(source[offsets[layer] :], into.whole[into.geometry.offsets[layer] :]) for layer in span.layers]
    return _carry(crossing, span, runs, pairs)


def require_fit(fits: Fits) -> None:
    """Once it is done: raises `OverflowError` if something did not fit."""
    if fits is not None and not fits.item():
        raise OverflowError(TOO_LARGE)


def _carry(crossing: Crossing, span: Span, runs: Table, layers: list[tuple[Tensor, Tensor]]) -> Fits:
    """`runs`, which count bytes or, where it is cast, elements, from the first to the second of each pair."""
    dtypes = [DTYPES[places[span.group].dtype] for places in (crossing.sources, crossing.destinations)]
    assert not crossing.casts(span.group) or torch.int8 not in dtypes, "a pool on a GPU is not int8"
    if not crossing.casts(span.group):
        dtypes = [torch.uint8, torch.uint8]
    fits: list[Tensor] = []
    for table in rows(runs, crossing.block(span.group) // dtypes[0].itemsize, layers[0][1].device):
        for sides in layers:
            found = _move(_elements(sides[0], dtypes[0]), _elements(sides[1], dtypes[1]), table)
            if found is not None:
                fits.append(found)
    return torch.stack(fits).all() if fits else None


def _elements(flat: Tensor, dtype: torch.dtype) -> Tensor:
    return flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)


def _move(source: Tensor, destination: Tensor, table: Rows) -> Fits:
    """One table, between flat tensors of bytes or of elements; elements are rounded to the destination's dtype."""
    here, there = (side[: len(side) // table.length * table.length].view(-1, table.length) for side in (source, destination))
    if source.dtype is torch.uint8:
        word = WORDS[gcd(table.length, 8, source.storage_offset(), destination.storage_offset())]
        here, there = here.view(word), there.view(word)
    return move_rows(here, there, table.here, table.there)


def _staged(crossing: Crossing, span: Span, slot: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each layer, and where it is in a packed piece."""
    length = crossing.bytes(span) // len(span.layers)
    for number, layer in enumerate(span.layers):
        yield layer, slot[number * length : (number + 1) * length]
