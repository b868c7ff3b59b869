"""The C++ kernels against their twins: fresh random inputs, odd shapes, poisoned outputs, poisoned memory around what may be read."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest
import torch
from diptych.kernels.argmax import argmax, argmax_torch
from diptych.kernels.attend_singles import attend_singles, make_paged_singles
from diptych.kernels.gated import gated, gated_torch
from diptych.kernels.kv_store import store_rows
from diptych.kernels.linear import linear, rows_alike
from diptych.kernels.native import _kernel, build, kernels_dir, native
from diptych.kernels.paged_attention import attend, make_chunk, make_singles
from diptych.kernels.paging import Paging
from diptych.kernels.residual_norm import residual_norm, residual_norm_torch
from diptych.kernels.rotary import rotary_angles
from diptych.kernels.rotary_store import rotary_store, rotary_store_torch
from diptych.kernels.threads import by_thread_that_ends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_world import BLOCK, World, randn, slow_attend

ULP = 2.0**-7
"""Between two bf16 next to each other, at most, as a share of them."""
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if native() is None:
        pytest.skip("no C++ kernels here")


@pytest.fixture(autouse=True, scope="module")
def _poisoned(_kernels):
    """Every `torch.empty` is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 100), st.integers(1, 300), st.integers(1, 70), st.booleans(), seeds)
def test_linear(rows, n_in, n_out, biased, seed):
    x, weight, bias = (randn(*shape, seed=seed + i).bfloat16() for i, shape in enumerate([(rows, n_in), (n_out, n_in), (n_out,)]))
    out = linear(x, weight, bias if biased else None)
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    largest = x.double().abs() @ weight.double().abs().T + 1.0
    assert ((out.double() - expected).abs() <= ULP / 2 * expected.abs() + 2.0**-20 * largest).all()


def test_linear_by_columns_of_a_larger_matrix():
    """Rows of x and of the weight that lie apart."""
    x, weight = randn(3, 200, seed=1).bfloat16(), randn(9, 200, seed=2).bfloat16()
    assert torch.equal(linear(x[:, 40:110], weight[:, 40:110]), linear(x[:, 40:110].contiguous(), weight[:, 40:110].contiguous()))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(1, 2), seeds)
def test_a_row_of_a_product_does_not_depend_on_the_others(n_in, n_out, threads, seed):
    most = rows_alike(native())
    x, weight = randn(most, n_in, seed=seed).bfloat16(), randn(n_out, n_in, seed=seed + 1).bfloat16()
    alone = torch.cat([linear(row[None], weight) for row in x])
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(linear(x[:rows], weight), alone[:rows]) for rows in (*range(1, 19), 21, most))
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def many():
    """linear_many.cpp, on processors too where it is not used."""
    kernels = native()
    return kernels.linear_many or _kernel(ctypes.CDLL(str(build(kernels_dir()))).diptych_linear_many, *kernels.linear.argtypes)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 1100), st.integers(1, 100), st.booleans(), st.integers(1, 2), seeds)
def test_linear_of_many_rows(many, rows, n_in, n_out, biased, threads, seed):
    """Rows that lie apart, of x and of the weight."""
    x, weight, bias = (randn(*shape, seed=seed + i).bfloat16() for i, shape in enumerate([(rows, n_in + 3), (n_out, n_in + 5), (n_out,)]))
    out = torch.empty(rows, n_out, dtype=torch.bfloat16)
    places = out.data_ptr(), x.data_ptr(), weight.data_ptr(), bias.data_ptr() if biased else None
    many(*places, rows, n_in, n_out, n_in + 3, n_in + 5, threads)
    x, weight = x[:, :n_in].double(), weight[:, :n_in].double()
    expected = x @ weight.T + (bias.double() if biased else 0.0)
    assert ((out.double() - expected).abs() <= ULP / 2 * expected.abs() + 2.0**-20 * (x.abs() @ weight.abs().T + 1.0)).all()


def test_linear_of_many_rows_in_runs(many):
    """What a thread keeps of x is bounded, and where a run ends changes no number."""
    rows, n_in, n_out = 20, 1 << 20, 3  # 80 MiB in fp32
    x, weight = (randn(count, n_in, seed=count).bfloat16() for count in (rows, n_out))
    out = torch.empty(rows, n_out, dtype=torch.bfloat16)
    kept = []

    def compute():
        before = resident()
        many(out.data_ptr(), x.data_ptr(), weight.data_ptr(), None, rows, n_in, n_out, n_in, n_in, 1)
        kept.append(resident() - before)

    by_thread_that_ends(compute)
    assert kept[0] < 40 << 20
    for row in range(rows):
        alone = torch.empty(1, n_out, dtype=torch.bfloat16)
        many(alone.data_ptr(), x[row].data_ptr(), weight.data_ptr(), None, 1, n_in, n_out, n_in, n_in, 1)
        assert torch.equal(alone[0], out[row])


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_linear_writes_nothing_but_its_output(many):
    for kernel in (native().linear, many):
        x, weight = randn(6, 50, seed=1).bfloat16(), randn(13, 50, seed=2).bfloat16()
        around = torch.full((6 * 13 + 64,), 7.0).bfloat16()
        kernel(around[32:].data_ptr(), x.data_ptr(), weight.data_ptr(), None, 6, 50, 13, 50, 50, 1)
        assert (around[:32] == 7).all()
        assert (around[-32:] == 7).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 200), st.booleans(), seeds)
def test_residual_norm(rows, n, normed, seed):
    x, change = (randn(rows, n, seed=seed + i).mul_(5).bfloat16() for i in range(2))
    weights = [randn(n, seed=seed + i) for i in (2, 3)]
    change_weight = weights[0] if normed else None
    before = x.clone()
    total, out = residual_norm(x, change, change_weight, weights[1], 1e-6)
    total_, _ = residual_norm_torch(x, change, change_weight, weights[1], 1e-6)
    # A norm that rounds the other way is one unit of the change, which a sum near zero does not hide.
    changed = float((total_ - x).abs().max())
    torch.testing.assert_close(total, total_, rtol=ULP, atol=ULP * changed)
    torch.testing.assert_close(out, residual_norm_torch(total, torch.zeros_like(x), None, weights[1], 1e-6)[1], rtol=ULP, atol=0)
    assert torch.equal(x, before)
    assert out.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from(["gelu_tanh", "silu"]), seeds)
def test_gated(rows, width, activation, seed):
    gate_up = randn(rows, 2 * width, seed=seed).mul_(4).bfloat16()
    torch.testing.assert_close(gated(gate_up, activation), gated_torch(gate_up, activation), rtol=2 * ULP, atol=1e-5)


def test_gated_far_out():
    gate_up = torch.tensor([[-1e30, -90.0, -20.0, 0.0, 20.0, 90.0, 1e30, *([1.0] * 7)]]).bfloat16()
    for activation in ("gelu_tanh", "silu"):
        torch.testing.assert_close(gated(gate_up, activation), gated_torch(gate_up, activation), rtol=2 * ULP, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.booleans(), st.booleans(), seeds)
def test_rotary_store(tokens, kv_heads, group, half, normed, turned, seed):
    heads, head_dim = kv_heads * group, 2 * half
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, seed=seed).bfloat16()
    qk_norm = randn(heads + kv_heads, head_dim, seed=seed + 1) if normed else None
    angles = rotary_angles(torch.arange(tokens) * 37, randn(half, seed=seed + 2).abs()) if turned else None
    places = torch.randperm(5 * BLOCK, generator=torch.Generator().manual_seed(seed))[:tokens]
    rows = store_rows(places // BLOCK, places % BLOCK, kv_heads=kv_heads, block_size=BLOCK)
    caches = [torch.full((5, kv_heads, 2, BLOCK, head_dim), 7.0).bfloat16() for _ in range(2)]
    options = {"heads": heads, "qk_norm": qk_norm, "angles": angles, "eps": 1e-6}
    queries = rotary_store(qkv, caches[0], rows, **options)
    expected = rotary_store_torch(qkv, caches[1], rows, **options)
    # A turned pair is a sum of two products, each of which may have been one unit off.
    close = {"rtol": ULP, "atol": 2 * ULP * float(expected.abs().max()) if normed and turned else ULP * 2.0**-6}
    torch.testing.assert_close(queries, expected, **close)
    torch.testing.assert_close(caches[0], caches[1], **close)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 3000), st.integers(1, 4), st.booleans(), seeds)
def test_argmax(rows, n, values, below, seed):
    """With few different values, so that many are the largest: the first of them, in fp64 as in bf16."""
    x = torch.randint(1, values + 1, (rows, n), generator=torch.Generator().manual_seed(seed)).bfloat16()
    x = -x if below else x - 2.0
    expected = [row.index(max(row)) for row in x.tolist()]
    assert argmax(x).tolist() == argmax_torch(x).tolist() == expected


def test_argmax_next_to_infinity():
    x = torch.full((2, 100), -torch.inf).bfloat16()
    x[0, 70], x[1, 3] = -1e30, torch.inf
    assert argmax(x).tolist() == [70, 3]


lengths_ = st.lists(st.integers(1, 150), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(lengths_, st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 40), st.sampled_from([0.0, 0.7]), seeds)
def test_attend_singles(lengths, kv_heads, group, sixteens, window, softcap, seed):
    head_dim, heads = 16 * sixteens, kv_heads * group
    world = World(lengths, kv_heads, head_dim, seed)
    paging = Paging(kv_heads, BLOCK, window)
    query = randn(len(lengths), heads, head_dim, seed=seed - 1).bfloat16()
    lasts = [length - 1 for length in lengths]
    # Blocks that have left the window are -1, as in an engine's tables.
    tables = [[-1] * paging.first_block(last) + table[paging.first_block(last) :] for table, last in zip(world.tables, lasts, strict=True)]
    span = make_paged_singles(range(len(lengths)), lasts, tables, paging)
    out = attend_singles(query, world.cache, span, 0.3, softcap)
    for row, last in enumerate(lasts):
        expected = slow_attend(query[row], *world.kv[row], paging.first_key(last), last, 0.3, softcap)
        torch.testing.assert_close(out[row].double(), expected, rtol=ULP, atol=2e-3)
        alone = make_paged_singles([0], [last], [tables[row]], paging)
        assert torch.equal(attend_singles(query[row : row + 1], world.cache, alone, 0.3, softcap)[0], out[row])


def test_attend_singles_between_chunks_equals_its_twin():
    """A step of two single rows around a chunk, by both ways to attend for single rows."""
    world = World([40, 70, 90], 1, 32, 5)
    world.cache.nan_to_num_(9.0)  # the twin multiplies what it may not see by nothing
    paging = Paging(1, BLOCK, 24)
    query = randn(12, 4, 32, seed=7).bfloat16()
    chunk = make_chunk(1, 60, 10, world.tables[1], paging)
    single = ([0, 11], [39, 89], [world.tables[0], world.tables[2]], paging)
    ours = attend(query, world.cache, [chunk, make_paged_singles(*single)], 0.3)
    twin = attend(query, world.cache, [chunk, make_singles(*single, torch.bfloat16)], 0.3)
    torch.testing.assert_close(ours, twin, rtol=2 * ULP, atol=2e-2)


def test_two_threads_compute_the_same():
    world = World([150, 3, 90], 2, 64, 1)
    query = randn(3, 8, 64, seed=3).bfloat16()
    span = make_paged_singles(range(3), [149, 2, 89], world.tables, Paging(2, BLOCK, 0))
    x, weight = randn(300, 640, seed=1).bfloat16(), randn(640, seed=2)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((attend_singles(query, world.cache, span, 0.2, 0.0), *residual_norm(x, x, weight, weight, 1e-6), gated(x, "silu")))
    torch.set_num_threads(1)
    assert all(map(torch.equal, *found))
