"""The activation of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import native_for, threads_for
from .triton_kernels import triton_for

ACTIVATIONS = ("gelu_tanh", "silu")
UNGATED = ("relu",)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` where `gate_up` is [tokens, 2 * intermediate], gate first, contiguous; [tokens, intermediate].

    The activations of `UNGATED` have no gate: [tokens, intermediate] in and out.
    """
    if activation in UNGATED:
        return gated_torch(gate_up, activation)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if (on_gpu := triton_for(gate_up)) is not None:
        out = gate_up.new_empty(tokens, width)
        on_gpu.gated(out, gate_up, activation == "silu")
        return out
    if (kernels := native_for(gate_up)) is None:
        return gated_torch(gate_up, activation)
    out = torch.empty(tokens, width, dtype=gate_up.dtype)
    kernels.gated(out.data_ptr(), gate_up.data_ptr(), tokens, width, ACTIVATIONS.index(activation), threads_for(tokens * width))
    return out


def gated_torch(gate_up: Tensor, activation: str) -> Tensor:
    """The same by torch."""
    if activation == "relu":
        return F.relu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    opened = F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else F.silu(gate)
    return opened.mul_(up)
