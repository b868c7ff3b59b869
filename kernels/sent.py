"""Small things that the host says to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of this host's memory on `device`, through pinned memory, so that nobody waits; itself on a CPU."""
    if device.type == "cpu":
        return tensor
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return there.copy_(tensor.pin_memory() if device.type == "cuda" else tensor, non_blocking=True)
