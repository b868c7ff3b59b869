"""What is copied, packed and cast along a route, in real pools, against a twin that looks at one element after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.kv_transfer.coverage import Span
from diptych.kv_transfer.crossing import Crossing
from diptych.kv_transfer.memory import cast_runs, copy_runs
from diptych.kv_transfer.packing import pack, unpack
from diptych.kv_transfer.pool import DTYPES, Pool
from diptych.kv_transfer.slices import Route, routes
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCKS = 24


def worker(tp: int, stages: tuple[int, ...], size: int, dtype: DType) -> Layout:
    return Layout("model", (CacheGroup(CacheKind.FULL, (0, 1), 2, 4, dtype),), size, (BLOCKS,), tp, stages)


workers = st.builds(
    worker,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(), (1, 1)]),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([DType.FLOAT32, DType.BFLOAT16]),
)


@contextmanager
def pool_of(layout: Layout, rank: int) -> Iterator[Pool]:
    pool = Pool.allocate(layout.on(rank).layout)
    try:
        yield pool
    finally:
        pool.close()


def count(span: Span, size: int) -> int:
    return -(-span.stop // size) - span.start // size


def by_packing(source: Pool, destination: Pool, crossing: Crossing, span: Span, here: tuple[int, ...], there: tuple[int, ...]) -> None:
    slot = torch.zeros(1 << 16, dtype=torch.uint8)
    pack(source, crossing, span, here, slot)
    assert not slot[crossing.bytes(span) :].any(), "a piece is as long as both ends reckon"
    unpack(destination, crossing, span, there, slot)


def by_copying(source: Pool, destination: Pool, crossing: Crossing, span: Span, here: tuple[int, ...], there: tuple[int, ...]) -> None:
    reads, writes = (DTYPES[pool.layout.groups[0].dtype] for pool in (source, destination))
    for layer in span.layers:
        ends = source.address + source.geometry.offsets[layer], destination.address + destination.geometry.offsets[layer]
        if crossing.casts(0):
            cast_runs(ends[0], reads, ends[1], writes, crossing.between(span, here, there))
        else:
            copy_runs(*ends, crossing.between(span, here, there))


@pytest.mark.parametrize("move", [by_packing, by_copying])
@settings(max_examples=60, deadline=None)
@given(here=workers, there=workers, start=st.integers(0, 20), length=st.integers(1, 20), data=st.data())
def test_every_element_comes_once_and_rounded(
    move: object, here: Layout, there: Layout, start: int, length: int, data: st.DataObject
) -> None:
    route: Route = data.draw(st.sampled_from(routes(here, there)))
    span = Span(0, route.groups[0].layers, start, start + length)
    tables = [tuple(data.draw(st.permutations(range(BLOCKS)))[: count(span, layout.block_size)]) for layout in (here, there)]
    with pool_of(here, route.source) as source, pool_of(there, route.destination) as destination:
        torch.manual_seed(start)
        for cache in source.caches[0]:
            cache.copy_(torch.randn(cache.shape))
        move(source, destination, Crossing(route, here, there), span, *tables)  # type: ignore[operator]
        ranks = here.on(route.source), there.on(route.destination)
        for layer, position, offset in product(span.layers, range(start, span.stop), range(route.groups[0].kv_heads)):
            found = []
            for rank, pool, table in zip(ranks, (source, destination), tables, strict=True):
                size, head = rank.layout.block_size, route.first_heads[0] + offset - rank.first_heads[0]
                block = table[position // size - start // size]
                found.append(pool.caches[0][rank.layers(0).index(layer)][block, head, :, position % size])
            assert torch.equal(found[1], found[0].to(found[1].dtype))
            found[1].zero_()
        assert not any(cache.any() for cache in destination.caches[0]), "nothing beside it is written"
