"""Where the model is computed, and how weights and batches come there from this host's memory. On a CPU they are there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..kernels.quantized import Weight
from .inputs import CPU, Inputs
from .marks import Mark, new_mark

STAGED_BYTES = 32 << 20
"""Of each of two pinned buffers: a PCIe 4 link fills one in 1.3 ms, against some 10 us that a copy costs by itself."""
ALIGNED = 16
"""Bytes: where each tensor of a batch begins."""

T = TypeVar("T")


class Upload:
    """To one device. Not thread-safe."""

    def __init__(self, device: torch.device = CPU, *, staged_bytes: int = STAGED_BYTES) -> None:
        self.device = device
        self._pinned = device.type == "cuda" and torch.cuda.is_available()
        self._staged_bytes = staged_bytes
        self._buffers: list[tuple[Tensor, Mark]] = []
        self._turn = 0

    def weight(self, tensor: Tensor) -> Tensor:
        """The tensor on the device: itself if it is there, else a copy, which has all its bytes when this device's stream comes to it. The
        file's pages are read through two pinned buffers, one of which is filled while the other is on its way."""
        if tensor.device == self.device:
            return tensor
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source, target = tensor.contiguous().view(-1), there.view(-1)
        step = self._staged_bytes // tensor.itemsize
        for start in range(0, len(source), step):
            self._send(source[start : start + step], target[start : start + step])
        return there

    def product(self, weight: Weight) -> Weight:
        """The same for a matrix. `ModelError` if it is quantised and the device no CPU: no GPU kernel multiplies by such."""
        if isinstance(weight, Tensor):
            return self.weight(weight)
        if self.device.type != "cpu":
            raise ModelError(f"int{weight.bits} weights are for CPUs: prepare the model without quantization.", field="quantization")
        return weight

    def maybe(self, tensor: Tensor | None) -> Tensor | None:
        """The same for what not every model has."""
        return None if tensor is None else self.weight(tensor)

    def _send(self, source: Tensor, target: Tensor) -> None:
        if len(self._buffers) < 2:
            buffer = torch.empty(self._staged_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._buffers.append((buffer, new_mark(self.device)))
        buffer, sent = self._buffers[self._turn % len(self._buffers)]
        self._turn += 1
        sent.synchronize()  # what was in the buffer before
        staged = buffer[: source.nbytes].view(source.dtype)
        staged.copy_(source)
        target.copy_(staged, non_blocking=True)
        sent.record()

    def release(self) -> None:
        """Give the buffers back: no more weights come."""
        for _, sent in self._buffers:
            sent.synchronize()
        self._buffers.clear()

    def batch(self, inputs: Inputs) -> Inputs:
        """The inputs on the device; from pinned memory in one copy, for which nobody waits."""
        return inputs if self.device.type == "cpu" else self.together(inputs)

    def together(self, inputs: Inputs) -> Inputs:
        tensors: dict[int, Tensor] = {}
        _each_tensor(inputs, lambda tensor: tensors.setdefault(id(tensor), tensor))
        places, end = {}, 0
        for key, tensor in tensors.items():
            places[key] = end
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        staged = torch.empty(end, dtype=torch.uint8, pin_memory=self._pinned)
        for key, tensor in tensors.items():
            _cut(staged, places[key], tensor).copy_(tensor)
        there = staged.to(self.device, non_blocking=True)
        return _each_tensor(inputs, lambda tensor: _cut(there, places[id(tensor)], tensor))


def _cut(data: Tensor, place: int, like: Tensor) -> Tensor:
    """The part of `data`, bytes, that begins at `place` and is a tensor like this one."""
    return data[place : place + like.nbytes].view(like.dtype).view(like.shape)


def _each_tensor(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """`value` with every tensor in it changed; it is made of tuples and frozen dataclasses."""
    made: Any = value
    if isinstance(value, Tensor):
        made = change(value)
    elif isinstance(value, tuple):
        made = tuple(_each_tensor(each, change) for each in value)
    elif is_dataclass(value) and not isinstance(value, type):
        made = replace(value, **{field.name: _each_tensor(getattr(value, field.name), change) for field in fields(value)})
    return made  # type: ignore[no-any-return]
