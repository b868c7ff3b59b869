"""The Triton kernels against their twins: random inputs, odd shapes, poisoned outputs, NaN wherever nothing may be read."""

from __future__ import annotations

import pytest
import torch
from diptych.kernels import triton_kernels
from diptych.kernels.gated import gated, gated_torch
from diptych.kernels.kv_store import store_rows
from diptych.kernels.move_rows import move_rows, move_rows_torch
from diptych.kernels.residual_norm import residual_norm, residual_norm_torch
from diptych.kernels.rotary import rotary_angles
from diptych.kernels.rotary_store import rotary_store, rotary_store_torch
from diptych.kernels.triton_kernels import attends, triton_for
from paged_world import BLOCK, randn
from triton_place import DEVICE, DTYPES, ON_GPU, ROUNDING, on_triton

pytestmark = pytest.mark.usefixtures("on_triton")
__all__ = ["on_triton"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def there(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@dtypes
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 640), (2, 4096), (5, 77), (0, 64)])
@pytest.mark.parametrize("normed", [True, False])
def test_residual_norm(rows, n, normed, dtype):
    x, change = there(*(randn(rows, n, seed=n + i).mul(5).to(dtype) for i in range(2)))
    weights = there(*(randn(n, seed=n + i) for i in (2, 3)))
    change_weight = weights[0] if normed else None
    before = x.clone()
    total, out = residual_norm(x, change, change_weight, weights[1], 1e-6)
    twin, _ = residual_norm_torch(x, change, change_weight, weights[1], 1e-6)
    # A norm that rounds the other way is one unit of the change, which a sum near zero does not hide.
    changed = float((twin - x).abs().max()) if rows else 0.0
    torch.testing.assert_close(total, twin, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * changed)
    again = residual_norm_torch(total, torch.zeros_like(x), None, weights[1], 1e-6)[1]
    torch.testing.assert_close(out, again, rtol=ROUNDING[dtype], atol=1e-6)
    assert torch.equal(x, before)


@dtypes
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 1500), (2, 2048)])
def test_gated(rows, width, activation, dtype):
    (gate_up,) = there(randn(rows, 2 * width, seed=width).mul(4).to(dtype))
    if width > 3:
        gate_up[0, :4] = torch.tensor([-6e4, 6e4, 0.0, -20.0])
    before = gate_up.clone()
    torch.testing.assert_close(gated(gate_up, activation), gated_torch(gate_up, activation), rtol=2 * ROUNDING[dtype], atol=1e-5)
    assert torch.equal(gate_up, before)


@dtypes
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim"), [(1, 1, 4, 256), (3, 2, 1, 64), (2, 3, 3, 80), (5, 1, 8, 128), (1, 2, 5, 96), (2, 1, 1, 2)]
)
@pytest.mark.parametrize(("normed", "turned"), [(True, True), (False, True), (True, False), (False, False)])
def test_rotary_store(tokens, kv_heads, group, head_dim, normed, turned, dtype):
    heads = kv_heads * group
    (qkv,) = there(randn(tokens, (heads + 2 * kv_heads) * head_dim, seed=head_dim).to(dtype))
    qk_norm = there(randn(heads + kv_heads, head_dim, seed=1))[0] if normed else None
    angles = tuple(there(*rotary_angles(torch.arange(tokens) * 37, randn(head_dim // 2, seed=2).abs()))) if turned else None
    places = torch.randperm(5 * BLOCK, generator=torch.Generator().manual_seed(3))[:tokens]
    (rows,) = there(store_rows(places // BLOCK, places % BLOCK, kv_heads=kv_heads, block_size=BLOCK))
    caches = [torch.full((5, kv_heads, 2, BLOCK, head_dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    options = {"heads": heads, "qk_norm": qk_norm, "angles": angles, "eps": 1e-6}
    queries = rotary_store(qkv, caches[0], rows, **options)
    expected = rotary_store_torch(qkv, caches[1], rows, **options)
    # A turned pair is a sum of two products, each of which may have been one unit off.
    close = {"rtol": 2 * ROUNDING[dtype], "atol": 2 * ROUNDING[dtype] * float(expected.abs().max())}
    torch.testing.assert_close(queries, expected, **close)
    torch.testing.assert_close(caches[0], caches[1], **close)
    assert (caches[0] != 7.0).sum() == 2 * tokens * kv_heads * head_dim, "one key and one value for each token and head, and nothing else"


@pytest.mark.parametrize("length", [1, 24, 3000])
@pytest.mark.parametrize(
    ("reads", "writes"),
    [
        (torch.uint8, torch.uint8),
        (torch.int64, torch.int64),
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        pytest.param(torch.float32, torch.bfloat16, marks=[] if ON_GPU else pytest.mark.skip(reason="the interpreter does not round")),
    ],
)
def test_move_rows(reads, writes, length):
    source, here, place = randn(9, length, seed=length).mul(100).to(reads), torch.tensor([8, 0, 0, 5]), torch.tensor([3, 6, 0, 1])
    source, here, place = there(source, here, place)
    ours, expected = (torch.full((7, length), 9.0, device=DEVICE).to(writes) for _ in range(2))
    fits = move_rows(source, ours, here, place)
    checked = writes is torch.float16 and reads is not torch.float16
    found = move_rows_torch(source, expected, here, place, checked)
    assert torch.equal(ours, expected)
    assert [None if each is None else bool(each) for each in (fits, found)] == [True if checked else None] * 2


@pytest.mark.parametrize("odd", [1e6, float("nan"), -float("inf")])
def test_what_float16_cannot_hold_is_found(odd):
    source, to = torch.ones(4, 3000, device=DEVICE), torch.arange(4, device=DEVICE)
    source[2, 2999] = odd
    for moved, fits in (([0, 1, 3, 0], True), ([0, 1, 2, 3], False)):
        assert bool(move_rows(source, torch.zeros(4, 3000, dtype=torch.float16, device=DEVICE), torch.tensor(moved).to(DEVICE), to)) is fits


def test_what_they_do_not_take_is_left_to_torch(monkeypatch):
    assert triton_for(torch.zeros(2, device=DEVICE)) is not None
    assert triton_for(torch.zeros(2, dtype=torch.float64, device=DEVICE)) is None
    assert attends(torch.float32, 256, 16, DEVICE)
    assert not attends(torch.float32, 257, 16, DEVICE)
    assert not attends(torch.float16, 64, 24, DEVICE)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    assert triton_for(torch.zeros(2)) is None
    assert not attends(torch.float32, 64, 16, torch.device("cpu"))
