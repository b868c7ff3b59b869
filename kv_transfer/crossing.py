"""One route as the ranks at its ends see it: what of a piece lies where in the pool of the one and of the other."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.layout import DType, Layout, RankLayout
from .coverage import Span
from .geometry import Blocks, Runs, runs_between, runs_unpacked
from .slices import Route


@dataclass(frozen=True, slots=True)
class Place:
    """A route's part of a cache group at one end: there a block is [kv_heads, 2, size, head_dim] of `dtype`, and what goes the route
    begins with the block's head `first_head`."""

    size: int
    kv_heads: int
    first_head: int
    dtype: DType

    def holds(self, blocks: tuple[int, ...]) -> Blocks:
        return Blocks(blocks, self.size, self.kv_heads, self.first_head)


def _places(route: Route, rank: RankLayout) -> tuple[Place, ...]:
    groups = zip(rank.layout.groups, route.first_heads, rank.first_heads, strict=True)
    return tuple(Place(rank.layout.block_size, group.kv_heads, first - held, group.dtype) for group, first, held in groups)


class Crossing:
    """Runs are those of one layer. They count bytes, or, where the piece is cast, elements of each end's dtype."""

    def __init__(self, route: Route, source: Layout, destination: Layout) -> None:
        """`source` and `destination`: of the two workers, all ranks."""
        self._groups = route.groups
        self.sources = _places(route, source.on(route.source))
        self.destinations = _places(route, destination.on(route.destination))

    def casts(self, group: int) -> bool:
        return self.sources[group].dtype is not self.destinations[group].dtype

    def bytes(self, span: Span) -> int:
        """Of the piece as the source has it, which is how it crosses."""
        return span.bytes(self._groups)

    def block(self, group: int) -> int:
        """Bytes of what goes the route of one whole block of the source, in one layer."""
        return self.sources[group].size * self._groups[group].token_bytes

    def between(self, span: Span, source_blocks: tuple[int, ...], destination_blocks: tuple[int, ...]) -> Runs:
        """From the source's pool to the destination's."""
        here, there = self.sources[span.group], self.destinations[span.group]
        group = self._groups[span.group]
        row = self._row(span.group)
        return runs_between(here.holds(source_blocks), there.holds(destination_blocks), group.kv_heads, span.start, span.stop, row)

    def packed(self, span: Span, blocks: tuple[int, ...]) -> Runs:
        """From the source's pool to a packed piece; in bytes, since it is not cast yet."""
        here, group = self.sources[span.group], self._groups[span.group]
        row = group.head_dim * here.dtype.itemsize
        runs = runs_unpacked(here.size, here.holds(blocks), group.kv_heads, span.start, span.stop, row)
        return [(there, at, length) for at, there, length in runs]

    def unpacked(self, span: Span, blocks: tuple[int, ...]) -> Runs:
        """From a packed piece to the destination's pool."""
        there = self.destinations[span.group].holds(blocks)
        size, heads = self.sources[span.group].size, self._groups[span.group].kv_heads
        return runs_unpacked(size, there, heads, span.start, span.stop, self._row(span.group))

    def _row(self, group: int) -> int:
        """One head's K of one token."""
        itemsize = 1 if self.casts(group) else self.sources[group].dtype.itemsize
        return self._groups[group].head_dim * itemsize
