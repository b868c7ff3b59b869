"""Attention by the Triton kernels against sums written out in fp64: scattered blocks, everything else in the cache NaN."""

from __future__ import annotations

import pytest
import torch
from diptych.kernels.attend_chunks import make_paged_chunks
from diptych.kernels.attend_singles import PagedSingles, make_paged_singles
from diptych.kernels.gpu import tiles
from diptych.kernels.paged_attention import attend
from diptych.kernels.paging import Paging
from paged_world import BLOCK, World, randn, slow_attend
from triton_place import DEVICE, DTYPES, ROUNDING, on_triton

pytestmark = pytest.mark.usefixtures("on_triton")
__all__ = ["on_triton"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FULL, WINDOW, CAPPED, BOTH = (0, 0.0), (40, 0.0), (0, 0.7), (3, 2.0)
SHAPES = [
    (1, 4, 256, *FULL),
    (1, 4, 256, *BOTH),
    (2, 1, 64, *FULL),
    (2, 1, 64, *WINDOW),
    (2, 3, 80, *WINDOW),
    (2, 3, 80, *CAPPED),
    (1, 8, 128, *FULL),
    (1, 8, 128, *BOTH),
    (2, 5, 96, *WINDOW),
    (1, 20, 112, *CAPPED),
]
shapes = pytest.mark.parametrize(("kv_heads", "group", "head_dim", "window", "softcap"), SHAPES)
"""KV heads, query heads that share one, head_dim, what is seen, the cap of scores."""


def on_device(span):
    return type(span)(**{name: part.to(DEVICE) if isinstance(part, torch.Tensor) else part for name, part in fields(span)})


def fields(span):
    return ((name, getattr(span, name)) for name in span.__dataclass_fields__)


def close(found, expected, dtype):
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])


@dtypes
@shapes
def test_singles(kv_heads, group, head_dim, window, softcap, dtype):
    """Rows of a step in any order, among others that are not asked for; one split each."""
    lengths = [1, 150, 16, 33, 97]
    world, paging = World(lengths, kv_heads, head_dim, 5, dtype), Paging(kv_heads, BLOCK, window)
    query = randn(8, kv_heads * group, head_dim, seed=6).to(dtype)
    places, lasts = [6, 0, 7, 2, 3], [length - 1 for length in lengths]
    # Blocks that have left the window are -1, as in an engine's tables.
    tables = [[-1] * paging.first_block(last) + table[paging.first_block(last) :] for table, last in zip(world.tables, lasts, strict=True)]
    span = on_device(make_paged_singles(places, lasts, tables, paging))
    out = attend(query.to(DEVICE), world.cache.to(DEVICE), [span], 0.3, softcap).view(query.shape)
    for row, (place, last) in enumerate(zip(places, lasts, strict=True)):
        close(out[place], slow_attend(query[place], *world.kv[row], paging.first_key(last), last, 0.3, softcap), dtype)
    assert out[[1, 4, 5]].isnan().all(), "rows of another span are not touched"


@dtypes
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (300, 1.5)])
def test_singles_in_splits(window, softcap, dtype):
    """Contexts of several splits beside those of one, and the same when there are more splits than are joined at once."""
    lengths = [700, 1, 257, 5300]
    world, paging = World(lengths, 1, 64, 3, dtype), Paging(1, BLOCK, window)
    query, lasts = randn(4, 2, 64, seed=6).to(dtype), [length - 1 for length in lengths]
    span = on_device(make_paged_singles(range(4), lasts, world.tables, paging))
    out = attend(query.to(DEVICE), world.cache.to(DEVICE), [span], 0.3, softcap).view(query.shape)
    for row, last in enumerate(lasts):
        close(out[row], slow_attend(query[row], *world.kv[row], paging.first_key(last), last, 0.3, softcap), dtype)


@pytest.mark.parametrize("blocks", [1, 40])
def test_rows_that_see_nothing_are_zeros(blocks):
    """What fills the rows of a captured batch, in one split and in several."""
    world = World([blocks * BLOCK], 1, 64, 3, torch.float32)
    tables = torch.tensor([world.tables[0], [0] * blocks, [0] * blocks]).to(DEVICE)
    firsts, lasts = torch.tensor([0, 0, 5]).to(DEVICE), torch.tensor([blocks * BLOCK - 1, -1, 4]).to(DEVICE)
    query = randn(3, 2, 64, seed=6).to(DEVICE)
    span = PagedSingles(torch.tensor([2, 0, 1]).to(DEVICE), tables, firsts, lasts)
    out = attend(query, world.cache.to(DEVICE), [span], 0.3).view(query.shape)
    assert (out[:2] == 0.0).all()
    close(out[2], slow_attend(query[2].cpu(), *world.kv[0], 0, blocks * BLOCK - 1, 0.3, 0.0), torch.float32)


@dtypes
@shapes
def test_chunks(kv_heads, group, head_dim, window, softcap, dtype):
    """A whole prompt, one in the middle of its sequence, one of two tokens behind a long prefix; together, around a row with one token."""
    chunks = [(0, 45), (37, 60), (130, 2)]
    world, paging = (
        World([start + length for start, length in chunks] + [20], kv_heads, head_dim, 5, dtype),
        Paging(kv_heads, BLOCK, window),
    )
    places, total = [0, 46, 106], 108
    query = randn(total, kv_heads * group, head_dim, seed=6).to(dtype)
    firsts = [paging.first_block(start) for start in (*(start for start, _ in chunks), 19)]
    tables = [[-1] * first + table[first:] for first, table in zip(firsts, world.tables, strict=True)]
    long = [(place, *chunk, table) for place, chunk, table in zip(places, chunks, tables[:3], strict=True)]
    spans = [make_paged_chunks(long, paging), make_paged_singles([45], [19], tables[3:], paging)]
    if window:  # what lies before the first key that is seen may be anything, in the block that has that key, too
        for (start, _), table, first in zip(chunks, world.tables, firsts, strict=False):
            world.cache[table[first], :, :, : paging.first_key(start) - first * BLOCK] = torch.nan
    out = attend(query.to(DEVICE), world.cache.to(DEVICE), [on_device(span) for span in spans], 0.3, softcap).view(query.shape)
    asked = [
        (places[row] + i, row, start + i) for row, (start, length) in enumerate(chunks) for i in (0, *range(1, length - 1, 5), length - 1)
    ]
    for place, row, position in [*asked, (45, 3, 19)]:
        close(out[place], slow_attend(query[place], *world.kv[row], paging.first_key(position), position, 0.3, softcap), dtype)
    assert out.isfinite().all()


def test_many_short_chunks():
    """Each row's tiles are found by a search."""
    lengths = [2, 40, 3, 7, 2, 33, 16, 17, 5]
    world, paging = World(lengths, 1, 64, 5, torch.float32), Paging(1, BLOCK, 0)
    places = [sum(lengths[:row]) for row in range(len(lengths))]
    query = randn(sum(lengths), 2, 64, seed=6)
    span = on_device(make_paged_chunks(list(zip(places, [0] * 9, lengths, world.tables, strict=True)), paging))
    out = attend(query.to(DEVICE), world.cache.to(DEVICE), [span], 0.3).view(query.shape)
    for row, length in enumerate(lengths):
        for position in range(length):
            at = places[row] + position
            close(out[at], slow_attend(query[at], *world.kv[row], 0, position, 0.3, 0.0), torch.float32)


@pytest.mark.parametrize("generation", tiles.SHARED_BYTES)
def test_tiles_fit(generation):
    """Two tiles of keys and values, and the queries, in what a program may take of shared memory; for every head_dim and dtype that
    `attends` allows. (test_triton_compiles.py has what the compiler takes.)"""
    device = tiles.Gpu(generation, 100)
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (16, 32, 64, 128, 256):
            for tile in (tiles.decode_tile(device, head_dim, dtype), tiles.chunk_tile(device, head_dim, dtype)):
                assert tile.keys >= BLOCK <= tile.rows
                assert (4 * tile.keys + tile.rows) * head_dim * dtype.itemsize <= tiles.SHARED_BYTES[generation]


@pytest.mark.parametrize("rows", [1, 4, 64, 1000])
@pytest.mark.parametrize("keys", [16, 1000, 32_768, 1 << 20])
def test_splits_fill_the_device_and_are_not_too_small(rows, keys):
    size = tiles.split_keys(rows, 8, keys, 132)
    assert tiles.LEAST_KEYS <= size <= tiles.MOST_KEYS
    assert size % 128 == 0, "a split begins with a tile of keys"
    if size > tiles.LEAST_KEYS:
        assert -(-keys // (size // 2)) * rows * 8 > tiles.PROGRAMS_PER_CORE * 132, "larger only where there are programs enough"
