"""Weights of 8 and 4 bits: how they are packed, against a slow twin; the kernels against torch and linear.cpp."""

from __future__ import annotations

import pytest
import torch
from diptych.kernels import linear as linear_module
from diptych.kernels import native as native_module
from diptych.kernels import quantized as quantized_module
from diptych.kernels.linear import FEW_ROWS, NATIVE_ROWS, linear, linear_torch
from diptych.kernels.native import build, native
from diptych.kernels.quantized import GROUP, RUN, Quantized, dequantized, dequantized_torch, embedded, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_world import randn

INT8, INT4 = 8, 4
seeds = st.integers(0, 2**32)
kinds = st.sampled_from([INT8, INT4])


@pytest.fixture(autouse=True, scope="module")
def _poisoned():
    """Every `torch.empty` is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def matrix(kind: int, outputs: int, inputs: int, seed: int) -> Quantized:
    return quantize(randn(outputs, inputs * GROUP if kind == INT4 else inputs, seed=seed), kind)


def slow_weight(kept: Quantized, output: int, place: int) -> float:
    """As quantized.cpp says: of a run of 32 words of 16 bits, bits 4 s to 4 s + 3 of word j are number 32 s + j, plus 8."""
    if kept.bits == INT8:
        return float(kept.values[output, place]) * float(kept.scales[output, 0])
    run, (group, word) = place // RUN, divmod(place % RUN, 32)
    low, high = kept.values[output, 64 * run + 2 * word : 64 * run + 2 * word + 2].tolist()
    return float(((low | high << 8) >> 4 * group & 15) - 8) * float(kept.scales[output, place // GROUP])


@settings(deadline=None, max_examples=30)
@given(kinds, st.integers(1, 5), st.integers(1, 11), seeds)
def test_weights_are_numbers_times_scales(kind, outputs, inputs, seed):
    kept = matrix(kind, outputs, inputs, seed)
    slow = [[slow_weight(kept, output, place) for place in range(kept.inputs)] for output in range(outputs)]
    assert torch.equal(dequantized_torch(kept, torch.float32), torch.tensor(slow))
    assert dequantized_torch(kept, torch.bfloat16).equal(torch.tensor(slow).bfloat16())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 300), seeds)
def test_int8_is_the_nearest_number(outputs, inputs, seed):
    weight = randn(outputs, inputs, seed=seed)
    kept = quantize(weight, INT8)
    assert ((dequantized_torch(kept, torch.float32) - weight).abs() <= kept.scales / 2 * 1.001).all()
    assert (kept.values.abs().amax(1) == 127).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), seeds)
def test_int4_is_as_near_as_plain_rounding_or_nearer(outputs, groups, seed):
    weight = randn(outputs, groups * GROUP, seed=seed)
    each = weight.view(outputs, groups, GROUP)
    scales = (each.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    plain = (each / scales).round().clamp(-8, 7) * scales
    found = dequantized_torch(quantize(weight, INT4), torch.float32).view_as(each)
    assert ((found - each).square().sum(2) <= (plain - each).square().sum(2) * 1.0001).all()


@pytest.mark.parametrize("kind", [INT8, INT4])
def test_zeros_stay_zeros(kind):
    weight = randn(3, 2 * GROUP, seed=1)
    weight[1] = 0
    assert (dequantized_torch(quantize(weight, kind), torch.float32)[1] == 0).all()


@settings(deadline=None, max_examples=25)
@given(kinds, st.integers(1, 12), st.integers(1, 20), st.integers(1, 2), seeds)
def test_dequantized(kind, outputs, inputs, threads, seed):
    kept = matrix(kind, outputs, inputs, seed)
    places = torch.randint(outputs, (7,), generator=torch.Generator().manual_seed(seed))
    torch.set_num_threads(threads)
    try:
        found, chosen = dequantized(kept, torch.bfloat16), embedded(places, kept, torch.bfloat16)
    finally:
        torch.set_num_threads(1)
    expected = dequantized_torch(kept, torch.bfloat16)
    assert torch.equal(found, expected)
    assert torch.equal(chosen, expected[places])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, FEW_ROWS), st.integers(1, 20), st.integers(1, 30), st.booleans(), st.integers(1, 2), seeds)
def test_an_int4_product_is_that_with_the_weights_dequantised(rows, inputs, outputs, biased, threads, seed):
    kept = matrix(INT4, outputs, inputs, seed)
    x, bias = randn(rows, kept.inputs, seed=seed + 1).bfloat16(), randn(outputs, seed=seed + 2).bfloat16()
    found = product(x, kept, bias if biased else None, threads)
    assert found.isfinite().all()
    assert torch.equal(found, linear(x, dequantized_torch(kept, torch.bfloat16), bias if biased else None))


few_or_many = st.one_of(st.integers(1, 5), st.integers(6, NATIVE_ROWS))


@settings(deadline=None, max_examples=40)
@given(few_or_many, st.integers(1, 300), st.integers(1, 30), st.booleans(), st.integers(1, 2), seeds)
def test_int8_products(rows, n_in, outputs, biased, threads, seed):
    """Rows of sizes far apart, and in each a few inputs much larger than the others."""
    if native() is None:
        pytest.skip("no C++ kernels here")
    kept = matrix(INT8, outputs, n_in, seed)
    x, bias = randn(rows, n_in, seed=seed + 1), randn(outputs, seed=seed + 2).bfloat16()
    x *= torch.randint(-40, 40, (rows, 1), generator=torch.Generator().manual_seed(seed)).float().exp2()
    x[:, :: 1 + seed % 97] *= 300
    x = x.bfloat16()
    found = product(x, kept, bias if biased else None, threads)
    weight = kept.values.double() * kept.scales.double()
    expected = x.double() @ weight.T + (bias.double() if biased else 0.0)
    largest = x.double().abs() @ weight.abs().T + x.double().abs().amax(1, keepdim=True) + (bias.double().abs() if biased else 0.0)
    assert ((found.double() - expected).abs() <= 2.0**-8 * expected.abs() + 2.0**-20 * largest).all()


def test_no_number_stays_none():
    kept, x = matrix(INT8, 5, 70, 1), randn(3, 70, seed=2).bfloat16()
    x[1, 3], x[2, 69] = torch.nan, torch.inf
    found = product(x, kept, None, 1)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()
    assert torch.equal(product(torch.zeros(2, 70).bfloat16(), kept, None, 1), torch.zeros(2, 5).bfloat16())


def product(x: torch.Tensor, kept: Quantized, bias: torch.Tensor | None, threads: int) -> torch.Tensor:
    torch.set_num_threads(threads)
    try:
        return linear(x, kept, bias)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [INT8, INT4])
def test_products_of_many_rows_and_by_torch(kind, dtype, monkeypatch):
    """The weights of a few outputs at a time."""
    kept = matrix(kind, 50, 5, 1)
    monkeypatch.setattr(quantized_module, "PART_BYTES", 7 * kept.inputs * dtype.itemsize)
    x, bias = randn(NATIVE_ROWS + 1, kept.inputs, seed=2).to(dtype), randn(50, seed=3).to(dtype)
    weight = dequantized_torch(kept, dtype)
    torch.testing.assert_close(linear(x, kept, bias), linear_torch(x, weight, bias), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("kind", [INT8, INT4])
def test_rows_and_columns(kind):
    kept = quantize(randn(9, 10 * GROUP, seed=1), kind)
    whole = dequantized_torch(kept, torch.float32)
    assert torch.equal(dequantized_torch(kept[2:7], torch.float32), whole[2:7])
    for run in (slice(0, 5 * GROUP), slice(5 * GROUP, 10 * GROUP), slice(3 * GROUP, 4 * GROUP)):
        part = kept.columns(run)
        assert part.shape == (9, run.stop - run.start)
        assert torch.equal(dequantized_torch(part, torch.float32), whole[:, run])


@pytest.mark.parametrize("bits", [INT8, INT4])
def test_nothing_is_written_but_the_output(bits):
    if (kernels := native()) is None:
        pytest.skip("no C++ kernels here")
    kept = matrix(bits, 13, 6, 1)
    x = randn(6, kept.inputs, seed=2).bfloat16()
    around = torch.full((6 * 13 + 64,), 7.0).bfloat16()
    out = around[32:].data_ptr()
    kernels.linear_quantized(
        out, x.data_ptr(), kept.values.data_ptr(), kept.scales.data_ptr(), None, bits, 6, kept.inputs, 13, kept.inputs, 1
    )
    assert (around[:32] == 7).all()
    assert (around[-32:] == 7).all()


@pytest.mark.nightly
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_processors_without_avx512(level, monkeypatch, tmp_path):
    if native() is None or native_module.platform.machine() != "x86_64":
        pytest.skip("no compiler, or its flags are others")
    flags = [f"-march={level}" if flag.startswith("-march") else flag for flag in native_module.FLAGS]
    monkeypatch.setattr(native_module, "FLAGS", tuple(flags))
    kernels = native_module._load(build(tmp_path))
    for module in (quantized_module, linear_module):
        monkeypatch.setattr(module, "native_for", lambda x: kernels)
    for bits in (INT8, INT4):
        kept = matrix(bits, 11, 7, 3)
        assert torch.equal(dequantized(kept, torch.bfloat16), dequantized_torch(kept, torch.bfloat16))
        x = randn(3, kept.inputs, seed=4).bfloat16()
        expected = x.double() @ dequantized_torch(kept, torch.float32).double().T
        torch.testing.assert_close(linear(x, kept).double(), expected, rtol=2**-7, atol=2**-4)
