"""How far each layer's positions have come: computed, announced or received. In order, without holes, each once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from ..core.layout import CacheGroup
from ..core.value import value

PIECE_BYTES = 16 << 20
"""The most that is copied at once: 1 ms of copying, the longest a fence waits for a copy under way."""


@value
class Span:
    """Positions [start, stop) of `layers`, all of cache group `group`."""

    group: int
    layers: tuple[int, ...]
    start: int
    stop: int

    def bytes(self, groups: tuple[CacheGroup, ...]) -> int:
        return (self.stop - self.start) * len(self.layers) * groups[self.group].token_bytes


def blocks_of(span: Span, block_size: int) -> int:
    """How many blocks hold the span's positions; the first and the last perhaps only in part."""
    return -(-span.stop // block_size) - span.start // block_size


class Coverage:
    """Layer `l` of group g is covered from `starts[g]` up to `until(l)`; the aim is `end` for all of them."""

    def __init__(self, groups: tuple[CacheGroup, ...], starts: tuple[int, ...], end: int) -> None:
        self._end = end
        self._until = {layer: start for group, start in zip(groups, starts, strict=True) for layer in group.layers}

    @property
    def complete(self) -> bool:
        return set(self._until.values()) <= {self._end}

    def until(self, layer: int) -> int:
        return self._until[layer]

    def beyond(self, other: Coverage, layers: tuple[int, ...]) -> dict[tuple[int, int], list[int]]:
        """Those of `layers` that are covered further here than there, by from where and up to where."""
        found: dict[tuple[int, int], list[int]] = {}
        ours, theirs = self._until, other._until
        for layer in layers:
            if theirs[layer] < ours[layer]:
                found.setdefault((theirs[layer], ours[layer]), []).append(layer)
        return found

    def extend(self, layers: tuple[int, ...], start: int, stop: int) -> None:
        """Cover [start, stop) of `layers`; `ValueError` (and no change) if that leaves a hole, repeats a position, goes past the
        end, or a layer is named twice or unknown."""
        if len(set(layers)) != len(layers):
            raise ValueError(f"layers {layers} repeat")
        if not start <= stop <= self._end:
            raise ValueError(f"positions [{start}, {stop}) are not within {self._end}")
        for layer in layers:
            if self._until.get(layer) != start:
                raise ValueError(f"layer {layer} stands at {self._until.get(layer)}, not at {start}")
        for layer in layers:
            self._until[layer] = stop


def ahead(groups: tuple[CacheGroup, ...], block_size: int, computed: Coverage, announced: Coverage, most_bytes: int) -> Iterator[Span]:
    """What of `groups` is computed and not yet announced, in spans of at most `most_bytes` (which must hold a block of any layer). Layers
    with equal positions share a span; only what is too long in a single layer is cut, between blocks of `block_size`."""
    for number, group in enumerate(groups):
        for (start, stop), layers in computed.beyond(announced, group.layers).items():
            width = max(1, most_bytes // ((stop - start) * group.token_bytes))
            for first in range(0, len(layers), width):
                yield from _cut(Span(number, tuple(layers[first : first + width]), start, stop), group.token_bytes, block_size, most_bytes)


def _cut(span: Span, token_bytes: int, size: int, most_bytes: int) -> Iterator[Span]:
    if (span.stop - span.start) * len(span.layers) * token_bytes <= most_bytes:
        yield span
        return
    length = most_bytes // (size * token_bytes) * size
    edges = [span.start, *range((span.start // size) * size + length, span.stop, length), span.stop]
    for start, stop in pairwise(edges):
        yield Span(span.group, span.layers, start, stop)
