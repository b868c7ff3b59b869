"""One route as the ranks at its ends see it: what of a piece lies where in the pool of the one and of the other."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from ..core.layout import DType, Layout, RankLayout
from .coverage import Span
from .geometry import Blocks, Runs, Table, runs_between, runs_unpacked
from .slices import Route

KEPT = 64
"""Tables kept: a transfer's pieces of one group have the same, layer after layer, and a few transfers take turns."""


@dataclass(frozen=True, slots=True)
class Place:
    """A route's part of a cache group at one end: there a block is [kv_heads, 2, size, width] of `dtype`, and what goes the route
    begins with the block's head `first_head`."""

    size: int
    kv_heads: int
    first_head: int
    dtype: DType
    head_dim: int
    width: int

    def holds(self, blocks: tuple[int, ...]) -> Blocks:
        return Blocks(blocks, self.size, self.kv_heads, self.first_head)


def _places(route: Route, rank: RankLayout) -> tuple[Place, ...]:
    groups = zip(rank.layout.groups, route.first_heads, rank.first_heads, strict=True)
    size = rank.layout.block_size
    return tuple(Place(size, group.kv_heads, first - held, group.dtype, group.head_dim, group.width) for group, first, held in groups)


def _table(runs: Runs) -> Table:
    return array("q", chain.from_iterable(runs))


class Crossing:
    """Runs are those of one layer. They count bytes, or, where the piece is cast, numbers: head_dim of them a row."""

    def __init__(self, route: Route, source: Layout, destination: Layout) -> None:
        """`source` and `destination`: of the two workers, all ranks."""
        self._groups = route.groups
        self.sources = _places(route, source.on(route.source))
        self.destinations = _places(route, destination.on(route.destination))
        self._between, self._unpacked = lru_cache(KEPT)(self._find_between), lru_cache(KEPT)(self._find_unpacked)
        self._packed = lru_cache(KEPT)(self._find_packed)

    def casts(self, group: int) -> bool:
        return self.sources[group].dtype is not self.destinations[group].dtype

    def bytes(self, span: Span) -> int:
        """Of the piece as the source has it, which is how it crosses."""
        return span.bytes(self._groups)

    def block(self, group: int) -> int:
        """Bytes of what goes the route of one whole block of the source, in one layer."""
        return self.sources[group].size * self._groups[group].token_bytes

    def between(self, span: Span, source_blocks: tuple[int, ...], destination_blocks: tuple[int, ...]) -> Table:
        """From the source's pool to the destination's."""
        return self._between(span.group, span.start, span.stop, source_blocks, destination_blocks)

    def packed(self, span: Span, blocks: tuple[int, ...]) -> Table:
        """From the source's pool to a packed piece; in bytes, since it is not cast yet."""
        return self._packed(span.group, span.start, span.stop, blocks)

    def unpacked(self, span: Span, blocks: tuple[int, ...]) -> Table:
        """From a packed piece to the destination's pool."""
        return self._unpacked(span.group, span.start, span.stop, blocks)

    def _find_between(self, group: int, start: int, stop: int, blocks: tuple[int, ...], blocks_there: tuple[int, ...]) -> Table:
        here, there = self.sources[group].holds(blocks), self.destinations[group].holds(blocks_there)
        return _table(runs_between(here, there, self._groups[group].kv_heads, start, stop, self._row(group)))

    def _find_packed(self, group: int, start: int, stop: int, blocks: tuple[int, ...]) -> Table:
        here, crossing = self.sources[group], self._groups[group]
        runs = runs_unpacked(here.size, here.holds(blocks), crossing.kv_heads, start, stop, crossing.row_bytes)
        return _table([(there, at, length) for at, there, length in runs])

    def _find_unpacked(self, group: int, start: int, stop: int, blocks: tuple[int, ...]) -> Table:
        there, size = self.destinations[group].holds(blocks), self.sources[group].size
        return _table(runs_unpacked(size, there, self._groups[group].kv_heads, start, stop, self._row(group)))

    def _row(self, group: int) -> int:
        """One head's K of one token."""
        return self._groups[group].head_dim if self.casts(group) else self._groups[group].row_bytes
