"""The activation of the MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu_tanh", "silu")
UNGATED = ("relu",)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` where `gate_up` is [tokens, 2 * intermediate], gate first; [tokens, intermediate].

    The activations of `UNGATED` have no gate: [tokens, intermediate] in and out.
    """
    if activation == "relu":
        return F.relu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    opened = F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else F.silu(gate)
    return opened.mul_(up)
