"""The int8 cache: what is stored is the nearest there is, and both ways to store and to read it are one."""

from __future__ import annotations

import pytest
import torch
from diptych.core.layout import CacheGroup, CacheKind, DType
from diptych.kernels.attend_singles import attend_singles, make_paged_singles
from diptych.kernels.int8_rows import GROUP, decode, encode, numbers_in, read_blocks, read_blocks_torch, width
from diptych.kernels.kv_store import store_rows
from diptych.kernels.native import native
from diptych.kernels.paged_attention import attend, make_chunk, make_singles
from diptych.kernels.paging import Paging
from diptych.kernels.rotary import rotary_angles
from diptych.kernels.rotary_store import rotary_store, rotary_store_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_world import BLOCK, World, randn, slow_attend

ULP = 2.0**-7
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def _kernels():
    if native() is None:
        pytest.skip("no C++ kernels here")


def test_a_row_is_as_long_as_layouts_reckon():
    for head_dim in range(1, 300):
        group = CacheGroup(CacheKind.FULL, (0,), 1, head_dim, DType.INT8)
        assert group.row_bytes == group.width == width(head_dim)
        assert numbers_in(width(head_dim)) == head_dim


def reach(x):
    """Of each number the largest of those with which it shares a scale."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    return groups.abs().amax(-1).repeat_interleave(GROUP, -1)[..., : x.shape[-1]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 300), st.floats(-25, 25), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_no_number_is_off_by_more_than_half_a_scale(rows, head_dim, exponent, dtype, seed):
    x = (randn(rows, head_dim, seed=seed) * 10.0**exponent).to(dtype)
    held = encode(x)
    assert (held.dtype, held.shape) == (torch.int8, (rows, width(head_dim)))
    assert (held[:, :head_dim] > -128).all()
    assert ((decode(held, torch.float32) - x.float()).abs() <= reach(x) / 127 * (0.5 + ULP)).all()


def test_what_is_no_finite_number_is_seen_and_what_is_nothing_is_zero():
    x = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [0.0, -0.0], [1e-45, -1e-45], [-3e38, 1.0]])
    found = decode(encode(x), torch.float32)
    assert found[:2].isnan().all()
    assert (found[2:4] == 0).all()
    torch.testing.assert_close(found[4], torch.tensor([-3e38, 0.0]), rtol=2**-8, atol=0)


@pytest.mark.usefixtures("_kernels")
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.booleans(), seeds)
def test_rotary_store(tokens, kv_heads, group, half, turned, seed):
    """Each row is within half a scale of what the twin stores in bf16, and nothing else is touched."""
    heads, head_dim = kv_heads * group, 2 * half
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, seed=seed).bfloat16()
    if seed % 3 == 0:
        qkv[0, -1] = torch.inf
    angles = rotary_angles(torch.arange(tokens) * 37, randn(half, seed=seed + 2).abs()) if turned else None
    places = torch.randperm(5 * BLOCK, generator=torch.Generator().manual_seed(seed))[:tokens]
    rows = store_rows(places // BLOCK, places % BLOCK, kv_heads=kv_heads, block_size=BLOCK)
    options = {"heads": heads, "qk_norm": None, "angles": angles, "eps": 1e-6}
    plain = torch.full((5, kv_heads, 2, BLOCK, head_dim), 7.0).bfloat16()
    held = [torch.full((5, kv_heads, 2, BLOCK, width(head_dim)), 77, dtype=torch.int8) for _ in range(2)]
    expected = rotary_store_torch(qkv, plain, rows, **options)
    for cache, store in zip(held, (rotary_store, rotary_store_torch), strict=True):
        torch.testing.assert_close(store(qkv, cache, rows, **options), expected, rtol=ULP, atol=ULP * 2.0**-6)
        touched = torch.zeros(cache[..., 0].numel(), dtype=torch.bool)
        touched[torch.cat([rows, rows + BLOCK])] = True
        lines, wanted = cache.view(-1, width(head_dim)), plain.view(-1, head_dim)[touched].float()
        assert (lines[~touched] == 77).all()
        found = decode(lines[touched], torch.float32)
        odd = ~reach(wanted).isfinite()
        assert found[odd].isnan().all()
        # Half a scale, and of a number of the twin's that is rounded the other way two units in the last place.
        assert ((found - wanted)[~odd].abs() <= reach(wanted)[~odd] * (0.5 / 127 * (1 + ULP) + 2 * ULP)).all()


@pytest.mark.usefixtures("_kernels")
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 20), seeds)
def test_read_blocks(blocks, head_dim, size, seed):
    cache = encode(randn(12, 2, 2, size, head_dim, seed=seed))
    read = torch.randint(48, (blocks,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(read_blocks(cache, read, torch.bfloat16), read_blocks_torch(cache, read, torch.bfloat16))


lengths_ = st.lists(st.integers(1, 150), min_size=1, max_size=6)


@pytest.mark.usefixtures("_kernels")
@settings(deadline=None, max_examples=40)
@given(lengths_, st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 40), st.sampled_from([0.0, 0.7]), seeds)
def test_attend_singles(lengths, kv_heads, group, sixteens, window, softcap, seed):
    """Over a cache that is NaN wherever nothing is seen."""
    head_dim, heads = 16 * sixteens, kv_heads * group
    world = World(lengths, kv_heads, head_dim, seed, held=torch.int8)
    paging = Paging(kv_heads, BLOCK, window)
    query = randn(len(lengths), heads, head_dim, seed=seed - 1).bfloat16()
    lasts = [length - 1 for length in lengths]
    tables = [[-1] * paging.first_block(last) + table[paging.first_block(last) :] for table, last in zip(world.tables, lasts, strict=True)]
    out = attend_singles(query, world.cache, make_paged_singles(range(len(lengths)), lasts, tables, paging), 0.3, softcap)
    for row, last in enumerate(lasts):
        expected = slow_attend(query[row], *world.kv[row], paging.first_key(last), last, 0.3, softcap)
        torch.testing.assert_close(out[row].double(), expected, rtol=ULP, atol=2e-3)
        alone = make_paged_singles([0], [last], [tables[row]], paging)
        assert torch.equal(attend_singles(query[row : row + 1], world.cache, alone, 0.3, softcap)[0], out[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 256), (3, 20)])
def test_gathered_chunks_and_singles(dtype, kv_heads, head_dim):
    world = World([40, 70, 90], kv_heads, head_dim, 5, dtype, held=torch.int8)
    world.cache[decode(world.cache, torch.float32).isnan().any(-1)] = 9  # what may not be seen is multiplied by nothing
    paging, query = Paging(kv_heads, BLOCK, 24), randn(12, 2 * kv_heads, head_dim, seed=7).to(dtype)
    single = ([0, 11], [39, 89], [world.tables[0], world.tables[2]])
    out = attend(query, world.cache, [make_chunk(1, 60, 10, world.tables[1], paging), make_singles(*single, paging, dtype)], head_dim**-0.5)
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for token, sequence, last in [(0, 0, 39), (11, 2, 89), *((1 + i, 1, 60 + i) for i in range(10))]:
        expected = slow_attend(query[token], *world.kv[sequence], paging.first_key(last), last, head_dim**-0.5, 0.0)
        torch.testing.assert_close(out.view(query.shape)[token].double(), expected, rtol=close, atol=close)
