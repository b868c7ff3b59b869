"""Where bytes lie and which are copied: against slow twins that think in positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.kv_transfer.closed_ids import REMEMBER_AT_MOST, REMEMBER_S, ClosedIds
from diptych.kv_transfer.coverage import PIECE_BYTES, Coverage, ahead
from diptych.kv_transfer.geometry import PAGE, Blocks, Geometry, runs_between
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_rig import LAYOUT

GROUP = CacheGroup(CacheKind.FULL, layers=(0,), kv_heads=2, head_dim=3, dtype=DType.FLOAT16)
SIZE = 4


def runs(start: int, stop: int, source: tuple[int, ...], destination: tuple[int, ...]) -> list[tuple[int, int, int]]:
    ends = (Blocks(numbers, SIZE, GROUP.kv_heads) for numbers in (source, destination))
    return runs_between(*ends, GROUP.kv_heads, start, stop, GROUP.head_dim * 2)


def twin(start: int, stop: int, source: tuple[int, ...], destination: tuple[int, ...]) -> dict[int, int]:
    """destination byte → source byte, position by position, head by head."""
    found = {}
    for position in range(start, stop):
        index = position // SIZE - start // SIZE
        for head in range(GROUP.kv_heads):
            for kv in range(2):
                for byte in range(GROUP.head_dim * 2):
                    at = [
                        (((block * GROUP.kv_heads + head) * 2 + kv) * SIZE + position % SIZE) * GROUP.head_dim * 2 + byte
                        for block in (source[index], destination[index])
                    ]
                    assert at[1] not in found
                    found[at[1]] = at[0]
    return found


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(1, 30), st.permutations(range(16)), st.permutations(range(16)), st.booleans())
def test_runs_cover_what_the_twin_covers(start: int, length: int, source: list[int], destination: list[int], sort: bool) -> None:
    stop = start + length
    count = -(-stop // SIZE) - start // SIZE
    here, there = tuple(source[:count]), tuple(destination[:count])
    if sort:
        here, there = tuple(sorted(here)), tuple(sorted(there))
    found: dict[int, int] = {}
    for source_offset, destination_offset, size in runs(start, stop, here, there):
        for byte in range(size):
            assert destination_offset + byte not in found, "a byte is copied twice"
            found[destination_offset + byte] = source_offset + byte
    assert found == twin(start, stop, here, there)


def test_neighbours_make_one_run() -> None:
    block = SIZE * GROUP.token_bytes
    assert runs(0, 16, (5, 6, 7, 8), (1, 2, 3, 4)) == [(5 * block, block, 4 * block)]
    assert len(runs(0, 16, (5, 6, 7, 8), (1, 2, 4, 5))) == 2


def test_layers_do_not_overlap_and_begin_on_pages() -> None:
    geometry = Geometry(replace(LAYOUT, num_blocks=(3, 5)))
    sizes = {layer: blocks * 16 * group.token_bytes for group, blocks in zip(LAYOUT.groups, (3, 5), strict=True) for layer in group.layers}
    ends = 0
    for layer, offset in sorted(geometry.offsets.items(), key=lambda item: item[1]):
        assert offset >= ends
        assert offset % PAGE == 0
        ends = offset + sizes[layer]
    assert ends <= geometry.size


BLOCK_BYTES = max(LAYOUT.block_size * group.token_bytes for group in LAYOUT.groups)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([(0,), (2,), (0, 2), (1, 3, 4), (0, 1, 2, 3, 4)]), st.integers(1, 30)), max_size=30),
    st.sampled_from([BLOCK_BYTES, BLOCK_BYTES + 100, 3 * BLOCK_BYTES, PIECE_BYTES]),
    st.data(),
)
def test_spans_ahead_tile_what_is_computed(steps: list[tuple[tuple[int, ...], int]], most: int, data: st.DataObject) -> None:
    """However computing and announcing interleave, every position from the grant on is announced once."""
    computed = Coverage(LAYOUT.groups, (0, 0), 100)
    announced = Coverage(LAYOUT.groups, (32, 64), 100)
    seen: list[tuple[int, int]] = []
    for layers, count in steps:
        start = computed.until(layers[0])
        layers = tuple(layer for layer in layers if computed.until(layer) == start)
        computed.extend(layers, start, min(start + count, 100))
        if data.draw(st.booleans()):
            announce(computed, announced, most, seen)
    announce(computed, announced, most, seen)
    wanted = [
        (layer, position)
        for group, first in zip(LAYOUT.groups, (32, 64), strict=True)
        for layer in group.layers
        for position in range(first, computed.until(layer))
    ]
    assert sorted(seen) == sorted(wanted)


def announce(computed: Coverage, announced: Coverage, most: int, seen: list[tuple[int, int]]) -> None:
    for span in list(ahead(LAYOUT.groups, LAYOUT.block_size, computed, announced, most)):
        assert span.bytes(LAYOUT.groups) <= most
        announced.extend(span.layers, span.start, span.stop)
        seen.extend((layer, position) for layer in span.layers for position in range(span.start, span.stop))


def test_layers_with_the_same_news_share_a_piece_up_to_its_size() -> None:
    wide = replace(GROUP, layers=tuple(range(8)), kv_heads=8, head_dim=128)
    layout = Layout("m", (wide,), 16, (1000,))
    computed, announced = Coverage(layout.groups, (0,), 2048), Coverage(layout.groups, (0,), 2048)
    computed.extend(wide.layers, 0, 2048)
    spans = list(ahead(layout.groups, layout.block_size, computed, announced, PIECE_BYTES))
    assert sum(len(span.layers) for span in spans) == 8
    assert all(span.bytes(layout.groups) <= PIECE_BYTES for span in spans)
    assert len(spans) == 4


@pytest.mark.parametrize(("layers", "start", "stop"), [((0,), 1, 2), ((0, 0), 0, 1), ((9,), 0, 1), ((0,), 0, 11), ((0,), 2, 1)])
def test_coverage_refuses_holes(layers: tuple[int, ...], start: int, stop: int) -> None:
    coverage = Coverage(LAYOUT.groups, (0, 0), 10)
    with pytest.raises(ValueError, match=r"position|layer"):
        coverage.extend(layers, start, stop)
    assert coverage.until(0) == 0


def test_closed_ids_are_forgotten_after_a_minute_and_bounded() -> None:
    closed = ClosedIds()
    closed.add("a", 0.0)
    assert closed.has("a", REMEMBER_S - 1)
    assert not closed.has("a", REMEMBER_S)
    assert not closed.has("b", 0.0)
    for number in range(REMEMBER_AT_MOST + 10):
        closed.add(str(number), 1.0)
    assert len(closed) == REMEMBER_AT_MOST
    closed.add("last", 1.0 + REMEMBER_S)
    assert len(closed) == 1
