"""Resharding against a slow twin that moves elements one by one: any parallelism, block size and dtype at either end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout, RankLayout, even_stages
from diptych.core.transfer import GroupGrant
from diptych.kv_transfer.geometry import Blocks, runs_between
from diptych.kv_transfer.slices import Slice, first_positions, routes, slices
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENS = 11
Element = tuple[int, int, int, int, int]
"""Layer, position, KV head, K or V, dimension."""
Memory = dict[tuple[int, int], Element]
"""Layer and offset in its cache, in elements → what is there."""
Tables = tuple[tuple[int, ...], ...]


def held(rank: RankLayout, tables: Tables, firsts: tuple[int, ...]) -> Memory:
    """Every element of a rank's pool that belongs to positions from `firsts[g]` on, put there one by one."""
    memory: Memory = {}
    size = rank.layout.block_size
    for number, group in enumerate(rank.layout.groups):
        for layer, position, head, kv, dim in product(
            group.layers, range(firsts[number], TOKENS), range(group.kv_heads), range(2), range(group.head_dim)
        ):
            block = tables[number][position // size]
            offset = (((block * group.kv_heads + head) * 2 + kv) * size + position % size) * group.head_dim + dim
            memory[layer, offset] = (layer, position, rank.heads(number)[head], kv, dim)
    return memory


def blocks(rank: RankLayout, piece: Slice, table: tuple[int, ...], start: int) -> Blocks:
    size = rank.layout.block_size
    group = rank.layout.groups[piece.group]
    return Blocks(table[start // size :], size, group.kv_heads, piece.heads.start - rank.first_heads[piece.group])


def move(source: Layout, destination: Layout, grants: tuple[int, ...]) -> None:
    """Every element that a destination rank lacks comes there once, from where the source has it, and nothing else is touched."""
    here, there = table_of(source, 3), table_of(destination, 5)
    kept = tuple(group.first_needed(TOKENS) // source.block_size * source.block_size for group in source.groups)
    pools = [held(source.on(rank), here, kept) for rank in range(source.ranks)]
    moved: list[Memory] = [{} for _ in range(destination.ranks)]
    firsts = first_positions(source, [GroupGrant(grant, ()) for grant in grants], TOKENS)
    for piece in slices(source, destination):
        start, group = firsts[piece.group], source.groups[piece.group]
        ends = (
            blocks(source.on(piece.source), piece, here[piece.group], start),
            blocks(destination.on(piece.destination), piece, there[piece.group], start),
        )
        found = runs_between(*ends, len(piece.heads), start, TOKENS, group.head_dim)
        assert (piece.reads, piece.writes) == (group.dtype, destination.groups[piece.group].dtype)
        for layer, (offset, offset_there, length) in product(piece.layers, found):
            for step in range(length):
                assert (layer, offset_there + step) not in moved[piece.destination], "an element comes twice"
                moved[piece.destination][layer, offset_there + step] = pools[piece.source][layer, offset + step]
    assert moved == [held(destination.on(rank), there, firsts) for rank in range(destination.ranks)]
    assert all(first <= max(grant, group.first_needed(TOKENS)) for first, grant, group in zip(firsts, grants, source.groups, strict=True))


def table_of(layout: Layout, step: int) -> Tables:
    """Blocks in an order that mixes neighbours and strangers; position 0's block first."""
    count = -(-TOKENS // layout.block_size)
    return tuple(tuple((index // 2 * step + index % 2 + number) % 97 for index in range(count)) for number in range(len(layout.groups)))


def shards(source: Layout, there: RankLayout, group: int) -> set[frozenset[int]]:
    """The sets of source ranks that hold the same of what `there` holds in `group`; layer by layer, head by head."""
    return {
        frozenset(rank for rank in range(source.ranks) if layer in source.on(rank).layers(group) and head in source.on(rank).heads(group))
        for layer, head in product(there.layers(group), there.heads(group))
    }


def are_few(source: Layout, destination: Layout) -> None:
    """One slice for each rank, group and shard: what is in different shards lies on different ranks, so fewer cannot do."""
    found = Counter((piece.destination, piece.group) for piece in slices(source, destination))
    for there, group in product(map(destination.on, range(destination.ranks)), range(len(source.groups))):
        assert found[there.rank, group] == len(shards(source, there, group))


@st.composite
def spreads(draw: st.DrawFn, layers: int, heads: tuple[int, int], cut: tuple[int, ...], window: int) -> Layout:
    """The model of `layers` layers, of which those in `cut` are in the window group, held somehow."""
    tp = draw(st.sampled_from([tp for tp in (1, 2, 3, 4, 6, 8) if all(count % tp == 0 or tp % count == 0 for count in heads)]))
    pp = draw(st.integers(1, layers))
    edges = [0, *sorted(draw(st.permutations(range(1, layers)))[: pp - 1]), layers]
    stages = tuple(stop - start for start, stop in pairwise(edges)) if pp > 1 else ()
    dtype = draw(st.sampled_from(DType))
    full = CacheGroup(CacheKind.FULL, tuple(layer for layer in range(layers) if layer not in cut), heads[0], 2, dtype)
    near = CacheGroup(CacheKind.WINDOW, cut, heads[1], 1, dtype, window)
    return Layout("model", (full, near), draw(st.sampled_from([1, 2, 3, 4, 6, 16])), (100, 100), tp, stages)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    layers = draw(st.integers(1, 6))
    heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 4), (6, 6), (4, 1), (2, 8), (3, 6)]))
    cut = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    of_the_model = spreads(layers, heads, cut, draw(st.integers(1, 12)))
    return draw(of_the_model), draw(of_the_model)


@settings(max_examples=150, deadline=None)
@given(pairs(), st.integers(0, TOKENS))
def test_every_element_comes_once_from_where_it_is(pair: tuple[Layout, Layout], cached: int) -> None:
    source, destination = pair
    size = destination.block_size
    move(source, destination, tuple(max(cached, group.first_needed(TOKENS)) // size * size for group in destination.groups))


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_there_are_as_few_as_there_can_be(pair: tuple[Layout, Layout]) -> None:
    are_few(*pair)


PARALLELISMS = list(product((1, 2, 4), (1, 2, 4)))
UNEVEN = {1: (), 2: (4, 1), 4: (1, 2, 1, 1)}


def model(tp: int, stages: tuple[int, ...], heads: tuple[int, int], block_size: int = 4) -> Layout:
    full = CacheGroup(CacheKind.FULL, (0, 3), heads[0], 1, DType.FLOAT32)
    near = CacheGroup(CacheKind.WINDOW, (1, 2, 4), heads[1], 1, DType.FLOAT32, window=6)
    return Layout("model", (full, near), block_size, (100, 100), tp, stages)


@pytest.mark.parametrize(("there_tp", "there_pp"), PARALLELISMS)
@pytest.mark.parametrize(("tp", "pp"), PARALLELISMS)
def test_any_parallelism_to_any(tp: int, pp: int, there_tp: int, there_pp: int) -> None:
    for heads in ((4, 4), (1, 1), (2, 4)):
        source = model(tp, UNEVEN[pp], heads)
        destination = model(there_tp, even_stages(5, there_pp), heads)
        move(source, destination, (0, 4))
        are_few(source, destination)


@pytest.mark.parametrize(("tp", "pp"), PARALLELISMS)
@pytest.mark.parametrize("heads", [(4, 4), (1, 1), (4, 1)])
def test_between_equal_workers_each_rank_gives_to_its_own_like(tp: int, pp: int, heads: tuple[int, int]) -> None:
    layout = model(tp, UNEVEN[pp], heads)
    assert {(piece.source, piece.destination) for piece in slices(layout, layout)} == {(rank, rank) for rank in range(layout.ranks)}


@pytest.mark.parametrize(("there_tp", "there_pp"), PARALLELISMS)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_replicas_share_the_work(tp: int, there_tp: int, there_pp: int) -> None:
    """None sends more than its sister by more than one destination rank takes."""
    source, destination = model(tp, (3, 2), (1, 1)), model(there_tp, UNEVEN[there_pp], (1, 1))
    for stage in range(2):
        takes = {rank: Counter[int]() for rank in range(stage * tp, stage * tp + tp)}
        for piece in slices(source, destination):
            if piece.source in takes:
                takes[piece.source][piece.destination] += len(piece.layers)
        sent = [sum(of.values()) for of in takes.values()]
        assert max(sent) - min(sent) <= max(taken for of in takes.values() for taken in of.values())


def test_more_replicas_than_takers_are_not_all_asked() -> None:
    one_taker = slices(model(8, (), (1, 1)), model(1, (), (1, 1)))
    assert [(piece.source, piece.destination, piece.group) for piece in one_taker] == [(0, 0, 0), (0, 0, 1)]


def test_layouts_of_two_models_have_no_slices() -> None:
    here = model(1, (), (1, 1))
    with pytest.raises(ValueError, match="fingerprint"):
        slices(here, replace(here, fingerprint="other"))
    with pytest.raises(ValueError, match="groups"):
        slices(here, model(1, (), (2, 2)))


@pytest.mark.parametrize(("size", "granted", "first"), [(16, 16, 32), (4, 36, 36), (4, 48, 48), (64, 0, 0)])
def test_of_a_window_only_what_the_source_still_holds_crosses(size: int, granted: int, first: int) -> None:
    """Of 50 tokens the next query sees those from 41 - 5 = 36 on."""
    full = CacheGroup(CacheKind.FULL, (0,), 1, 1, DType.FLOAT32)
    window = CacheGroup(CacheKind.WINDOW, (1,), 1, 1, DType.FLOAT32, window=15)
    assert window.first_needed(50) == 36
    source = Layout("model", (full, window), size, (10, 10))
    assert first_positions(source, [GroupGrant(0, ()), GroupGrant(granted, ())], 50) == (0, first)


@given(pairs())
def test_routes_are_the_slices_from_rank_to_rank(pair: tuple[Layout, Layout]) -> None:
    source, destination = pair
    found = [
        Slice(route.source, route.destination, number, group.layers, range(first, first + group.kv_heads), group.dtype, there.dtype)
        for route in routes(source, destination)
        for number, (group, first, there) in enumerate(zip(route.groups, route.first_heads, destination.groups, strict=True))
        if group.layers
    ]
    assert tuple(found) == slices(source, destination)
