"""Matrices of 8- and 4-bit numbers times scales. A weight is its number times its scale, rounded to the dtype that is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import native_for, threads_for

GROUP = 32
"""Inputs that share an int4 scale."""
RUN = 128
"""Inputs in one run of int4 numbers."""
PART_BYTES = 4 << 20
"""Of a product of many rows as many weights at a time are made: they stay in the third-level cache until they are multiplied."""
_TRIED = (-8.0, -7.5, -7.0, 8.0, 7.5, 7.0)
"""What the number of largest size in a group may become, of int4. With -8 alone the mean square error of normal weights is 8 % higher."""
_AT_ONCE = 1 << 18
"""Weights quantised at a time, which stay in the second-level cache."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [out, in]. int8: `values` int8 [out, in], `scales` float32 [out, 1]. int4: `values` uint8 [out, in / 2, in whole runs],
    two numbers a byte in the order of quantized.cpp, `scales` bfloat16 [out, in / GROUP]. Both contiguous."""

    values: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        """Of a number: 8 or 4."""
        return 8 if self.values.dtype is torch.int8 else 4

    @property
    def inputs(self) -> int:
        return self.values.shape[1] if self.bits == 8 else self.scales.shape[1] * GROUP

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.inputs

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: slice) -> Quantized:
        """Some rows, as views."""
        return Quantized(self.values[rows], self.scales[rows])

    def columns(self, run: slice) -> Quantized:
        """Some inputs, copied; of int4 whole groups."""
        if self.bits == 8:
            return Quantized(self.values[:, run].contiguous(), self.scales)
        groups = slice(run.start // GROUP, run.stop // GROUP)
        return Quantized(_packed(_numbers(self)[:, run]), self.scales[:, groups].contiguous())

    def parts(self, itemsize: int) -> Iterator[tuple[slice, Quantized]]:
        """All rows, as many at a time as are `PART_BYTES` with so many bytes a weight."""
        each = max(1, PART_BYTES // (self.inputs * itemsize))
        for start in range(0, len(self), each):
            rows = slice(start, min(start + each, len(self)))
            yield rows, self[rows]


Weight = Tensor | Quantized
"""A matrix [out, in]."""


def quantize(weight: Tensor, bits: int) -> Quantized:
    """The matrix [out, in], of any float dtype, in 8 or 4 bits. With 4 in is a multiple of `GROUP`."""
    each = max(1, _AT_ONCE // weight.shape[1])
    make = _int8 if bits == 8 else _int4
    parts = [make(weight[start : start + each].float()) for start in range(0, len(weight), each)]
    return Quantized(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))


def _int8(weight: Tensor) -> Quantized:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return Quantized((weight / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8), scales)


def _int4(weight: Tensor) -> Quantized:
    """The scale of each group is that of `_TRIED` which leaves the least error."""
    groups = weight.view(-1, GROUP)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    best, scales = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for number in _TRIED:
        tried = (largest / number).bfloat16().float()
        error = (_rounded(groups, tried) * tried - groups).square_().sum(1, keepdim=True)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(error, best)
    numbers = _rounded(groups, scales).to(torch.int8).view(weight.shape)
    return Quantized(_packed(numbers), scales.bfloat16().view(len(weight), -1))


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups / _divisor(scales)).round_().clamp_(-8, 7)


def _divisor(scales: Tensor) -> Tensor:
    """Where all weights are zero the scale is, and so are the numbers."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _packed(numbers: Tensor) -> Tensor:
    """int4 numbers, int8 [out, in], as bytes: number 32 s + j of a run is in bits 4 s of its word j."""
    padded = F.pad(numbers + 8, (0, -numbers.shape[1] % RUN), value=8).to(torch.uint8)
    low, high = padded.view(len(numbers), -1, 2, 2, 32).unbind(3)  # [out, run, byte, word]
    return (low | high << 4).transpose(2, 3).reshape(len(numbers), -1)


def _numbers(matrix: Quantized) -> Tensor:
    """The int4 numbers, int8 [out, in]."""
    pairs = matrix.values.view(len(matrix), -1, 32, 2).transpose(2, 3)  # [out, run, byte, word]
    numbers = torch.stack((pairs & 15, pairs >> 4), 3)
    return numbers.reshape(len(matrix), -1)[:, : matrix.inputs].to(torch.int8) - 8


def dequantized(matrix: Quantized, dtype: torch.dtype, places: Tensor | None = None) -> Tensor:
    """The weights [out, in]; of the rows `places` (int64 [n]) alone, if they are given."""
    count = len(matrix) if places is None else len(places)
    out = torch.empty(count, matrix.inputs, dtype=dtype, device=matrix.values.device)
    if (kernels := native_for(out)) is None:
        chosen = matrix if places is None else Quantized(matrix.values[places], matrix.scales[places])
        return dequantized_torch(chosen, dtype)
    kernels.dequantize(
        out.data_ptr(),
        matrix.values.data_ptr(),
        matrix.scales.data_ptr(),
        None if places is None else places.data_ptr(),
        matrix.bits,
        count,
        matrix.inputs,
        threads_for(out.numel()),
    )
    return out


def dequantized_torch(matrix: Quantized, dtype: torch.dtype) -> Tensor:
    """The same by torch."""
    if matrix.bits == 8:
        return (matrix.values * matrix.scales).to(dtype)
    groups = _numbers(matrix).view(len(matrix), -1, GROUP)
    return (groups * matrix.scales.float()[:, :, None]).to(dtype).view(len(matrix), -1)


def embedded(places: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """The rows `places` (int64 [n]) of a matrix."""
    return dequantized(weight, dtype, places) if isinstance(weight, Quantized) else F.embedding(places, weight)
