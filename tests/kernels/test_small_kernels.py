"""Norm, rotation, gate and matrix product against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from diptych.kernels.gated import gated
from diptych.kernels.layer_norm import layer_norm
from diptych.kernels.linear import linear
from diptych.kernels.rms_norm import rms_norm
from diptych.kernels.rotary import rotary_angles, rotate
from diptych.kernels.softcap import softcap_


def test_rms_norm():
    x, weight = torch.randn(3, 5, 8), torch.randn(5, 8)
    expected = torch.stack(
        [torch.stack([row / math.sqrt(float((row**2).mean()) + 1e-5) * weight[i] for i, row in enumerate(each)]) for each in x]
    )
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
    assert rms_norm(x.bfloat16(), weight, 1e-5).dtype is torch.bfloat16


def test_rotate():
    x, frequencies = torch.randn(2, 3, 6), torch.tensor([1.0, 0.1, 0.01])
    cos, sin = rotary_angles(torch.tensor([0, 7]), frequencies)
    out = rotate(x, cos, sin)
    torch.testing.assert_close(out[0], x[0])
    for i, frequency in enumerate(frequencies.tolist()):
        a, b, angle = x[1, :, i], x[1, :, i + 3], 7 * frequency
        torch.testing.assert_close(out[1, :, i], a * math.cos(angle) - b * math.sin(angle))
        torch.testing.assert_close(out[1, :, i + 3], b * math.cos(angle) + a * math.sin(angle))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated(activation):
    x = torch.randn(4, 10)
    gate, up = x[:, :5], x[:, 5:]
    formula = {
        "silu": lambda g: g / (1 + torch.exp(-g)),
        "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    }[activation]
    before = x.clone()
    torch.testing.assert_close(gated(x, activation), formula(gate) * up)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(rows, dtype):
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(48, 64).to(dtype)
    bias = torch.randn(48).to(dtype)
    expected = x.double() @ weight.double().T
    tolerance = 1e-4 if dtype is torch.float32 else 0.15
    torch.testing.assert_close(linear(x, weight).double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(linear(x, weight, bias).double(), expected + bias.double(), atol=tolerance, rtol=0)
    assert torch.backends.mkldnn.enabled


def test_relu_has_no_gate():
    x = torch.randn(4, 10)
    assert torch.equal(gated(x, "relu"), x.clamp(min=0))


def test_layer_norm():
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), expected)
    assert layer_norm(x.bfloat16(), weight, bias, 1e-5).dtype is torch.bfloat16


def test_softcap():
    x = torch.randn(20) * 10
    torch.testing.assert_close(softcap_(x.clone(), 3.0), 3.0 * torch.tanh(x / 3.0))
    assert torch.equal(softcap_(x.clone(), 0.0), x)
