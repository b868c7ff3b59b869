"""What is copied, packed and cast along a route, in real pools, against a twin that looks at one element after the other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.kernels.copy_runs import copy_runs
from diptych.kernels.int8_rows import encode, numbers_in
from diptych.kv_transfer.casting import cast_runs
from diptych.kv_transfer.coverage import Span
from diptych.kv_transfer.crossing import Crossing
from diptych.kv_transfer.memory import tensor_at
from diptych.kv_transfer.packing import pack, unpack
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.rows import copy_rows, pack_rows, require_fit, rows, unpack_rows
from diptych.kv_transfer.slices import Route, routes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

BLOCKS = 24


def worker(tp: int, stages: tuple[int, ...], size: int, dtype: DType) -> Layout:
    return Layout("model", (CacheGroup(CacheKind.FULL, (0, 1), 2, 4, dtype),), size, (BLOCKS,), tp, stages)


workers = st.builds(
    worker,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(), (1, 1)]),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from(DType),
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
    checksum = pack(source, crossing, span, here, slot)
    assert not slot[crossing.bytes(span) :].any(), "a piece is as long as both ends reckon"
    assert unpack(destination, crossing, span, there, slot, checksum)


def by_copying(source: Pool, destination: Pool, crossing: Crossing, span: Span, here: tuple[int, ...], there: tuple[int, ...]) -> None:
    for layer in span.layers:
        ends = source.address + source.geometry.offsets[layer], destination.address + destination.geometry.offsets[layer]
        if crossing.casts(0):
            cast_runs(ends[0], crossing.sources[0], ends[1], crossing.destinations[0], crossing.between(span, here, there))
        else:
            copy_runs([([ends], crossing.between(span, here, there))])


def by_packing_rows(source: Pool, destination: Pool, crossing: Crossing, span: Span, here: tuple[int, ...], there: tuple[int, ...]) -> None:
    """As on a GPU; the ends mixed, since what one packs the other unpacks."""
    slot, twin = torch.zeros(1 << 16, dtype=torch.uint8), torch.zeros(1 << 16, dtype=torch.uint8)
    pack_rows(source, crossing, span, here, slot)
    pack(source, crossing, span, here, twin)
    assert torch.equal(slot, twin)
    require_fit(unpack_rows(destination, crossing, span, there, slot))


def by_copying_rows(source: Pool, destination: Pool, crossing: Crossing, span: Span, here: tuple[int, ...], there: tuple[int, ...]) -> None:
    other = tensor_at(source.address, source.geometry.size, source.device)
    require_fit(copy_rows(other, source.geometry.offsets, destination, crossing, span, crossing.between(span, here, there)))


def fill(cache: torch.Tensor, dtype: DType) -> None:
    if dtype is DType.INT8:
        cache.copy_(encode(torch.randn(*cache.shape[:-1], numbers_in(cache.shape[-1]))))
    else:
        cache.copy_(torch.randn(cache.shape))


def numbers(row: torch.Tensor) -> list[float]:
    """Of one row, one after the other."""
    if row.dtype is not torch.int8:
        return [float(each) for each in row]
    scale = struct.unpack("f", bytes([0, 0, *(int(each) % 256 for each in row[-2:])]))[0]  # a bfloat16, the only one
    return [int(each) * scale for each in row[:-2]]


def assert_as_near_as_can_be(found: torch.Tensor, row: torch.Tensor) -> None:
    """One row at the destination, and at the source."""
    if found.dtype is row.dtype:
        assert torch.equal(found, row)
    elif found.dtype is torch.int8:
        scale = max(map(abs, numbers(row))) / 127
        assert all(abs(ours - theirs) <= 0.504 * scale for ours, theirs in zip(numbers(found), numbers(row), strict=True))
    else:
        assert torch.equal(found, torch.tensor(numbers(row), dtype=torch.float32).to(found.dtype))


@pytest.mark.parametrize("move", [by_packing, by_copying, by_packing_rows, by_copying_rows])
@settings(max_examples=60, deadline=None)
@given(here=workers, there=workers, start=st.integers(0, 20), length=st.integers(1, 20), data=st.data())
def test_every_element_comes_once_and_rounded(
    move: object, here: Layout, there: Layout, start: int, length: int, data: st.DataObject
) -> None:
    dtypes = {layout.groups[0].dtype for layout in (here, there)}
    assume(move in (by_packing, by_copying) or DType.INT8 not in dtypes or len(dtypes) == 1)  # pools on GPUs are not int8
    route: Route = data.draw(st.sampled_from(routes(here, there)))
    span = Span(0, route.groups[0].layers, start, start + length)
    tables = [tuple(data.draw(st.permutations(range(BLOCKS)))[: count(span, layout.block_size)]) for layout in (here, there)]
    with pool_of(here, route.source) as source, pool_of(there, route.destination) as destination:
        torch.manual_seed(start)
        for cache in source.caches[0]:
            fill(cache, here.groups[0].dtype)
        move(source, destination, Crossing(route, here, there), span, *tables)  # type: ignore[operator]
        ranks = here.on(route.source), there.on(route.destination)
        for layer, position, offset in product(span.layers, range(start, span.stop), range(route.groups[0].kv_heads)):
            found = []
            for rank, pool, table in zip(ranks, (source, destination), tables, strict=True):
                size, head = rank.layout.block_size, route.first_heads[0] + offset - rank.first_heads[0]
                block = table[position // size - start // size]
                found.append(pool.caches[0][rank.layers(0).index(layer)][block, head, :, position % size])
            for there_too, row in zip(found[1], found[0], strict=True):
                assert_as_near_as_can_be(there_too, row)
            found[1].zero_()
        assert not any(cache.any() for cache in destination.caches[0]), "nothing beside it is written"


def test_whole_blocks_are_one_table_and_the_rest_few() -> None:
    """256 blocks, the last of 5 tokens: thousands of runs, and four tables at most."""
    layout = Layout("model", (CacheGroup(CacheKind.FULL, (0,), 8, 64, DType.BFLOAT16),), 16, (300,))
    crossing = Crossing(routes(layout, layout)[0], layout, layout)
    span = Span(0, (0,), 0, 255 * 16 + 5)
    tables = rows(crossing.packed(span, tuple(range(299, 43, -1))), crossing.block(0), torch.device("cpu"))
    assert len(tables) <= 4
    assert max(tables, key=lambda table: table.length).length == crossing.block(0) == 2 * 8 * 16 * 64 * 2
    assert sum(table.length * len(table.here) for table in tables) == crossing.bytes(span)


@pytest.mark.parametrize("number", [1e5, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_no_number_there(number: float) -> None:
    here, there = (worker(1, (), 4, dtype) for dtype in (DType.FLOAT32, DType.FLOAT16))
    span, crossing = Span(0, (0, 1), 0, 4), Crossing(routes(here, there)[0], here, there)
    with pool_of(here, 0) as source, pool_of(there, 0) as destination:
        source.caches[0][1][3, 1, 0, 2, 1] = number
        for move in (by_packing, by_copying, by_packing_rows, by_copying_rows):
            with pytest.raises(OverflowError, match="65504"):
                move(source, destination, crossing, span, (3,), (5,))
