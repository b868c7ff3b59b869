"""Which part of each tensor a rank has: rows of the products that open a layer, columns of those that close it.

Rows are views of the memory-mapped file, so ranks of a host share its pages. Columns are copied: o and down once more, as private
memory, over all ranks of a stage. Without the copy a product takes as long, to a tenth, but for a single row in bf16, where torch
needs 2.2 times as long for columns that lie apart (2048 of 8192 columns, 2048 rows: 701 µs against 315).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.model import Decoder
from ..kernels.gated import UNGATED
from ..kernels.quantized import Quantized, Weight
from .weights import product

Part = tuple[Weight, Tensor | None]
"""Some rows of a product, and the bias of these rows."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `number` of `tp`: an even share of the query heads and of the inner MLP; of the KV heads too, or one that others also have."""

    decoder: Decoder
    tp: int = 1
    number: int = 0

    @property
    def heads(self) -> int:
        return self.decoder.heads // self.tp

    @property
    def kv_heads(self) -> int:
        return max(1, self.decoder.kv_heads // self.tp)

    def vocabulary(self, vocab_size: int) -> slice:
        """The token ids whose rows of embedding and head it has."""
        return slice(vocab_size * self.number // self.tp, vocab_size * (self.number + 1) // self.tp)

    def qkv(self, tensors: Mapping[str, Tensor], layer: int) -> tuple[Part, ...]:
        """The rows of its query heads, then of its KV heads' keys and values."""
        width = self.decoder.head_dim
        queries, keys = self._heads()
        values = _moved(keys, self.decoder.kv_heads)
        return _parts(tensors, f"{layer}.qkv", [slice(run.start * width, run.stop * width) for run in (queries, keys, values)])

    def qk_norm(self, tensors: Mapping[str, Tensor], layer: int) -> Tensor | None:
        """[heads + kv_heads, head_dim] of its own heads."""
        norm = tensors.get(f"{layer}.qk_norm")
        return None if norm is None else torch.cat([norm[run] for run in self._heads()])

    def gate_up(self, tensors: Mapping[str, Tensor], layer: int) -> tuple[Part, ...]:
        """The rows of its share of the gate, if there is one, and the same of up."""
        gate = self._share(self.decoder.intermediate)
        ungated = self.decoder.activation in UNGATED
        return _parts(tensors, f"{layer}.gate_up", [gate] if ungated else [gate, _moved(gate, self.decoder.intermediate)])

    def o(self, tensors: Mapping[str, Tensor], layer: int) -> Part:
        """The columns of its query heads; the bias comes with shard 0, for the shards' products are added up."""
        return self._columns(tensors, f"{layer}.o")

    def down(self, tensors: Mapping[str, Tensor], layer: int) -> Part:
        """The columns of its share of the inner MLP; the bias as in `o`."""
        return self._columns(tensors, f"{layer}.down")

    def _heads(self) -> tuple[slice, slice]:
        """Query heads, then KV heads, as rows of heads: the model's query heads, its KV heads' keys, their values."""
        first = self.number * self.decoder.kv_heads // self.tp
        keys = slice(first, first + self.kv_heads)
        return self._share(self.decoder.heads), _moved(keys, self.decoder.heads)

    def _share(self, count: int) -> slice:
        each = count // self.tp
        return slice(self.number * each, (self.number + 1) * each)

    def _columns(self, tensors: Mapping[str, Tensor], name: str) -> Part:
        weight, bias = product(tensors, name), tensors.get(f"{name}_bias") if self.number == 0 else None
        if self.tp == 1:
            return weight, bias
        share = self._share(weight.shape[1])
        return weight.columns(share) if isinstance(weight, Quantized) else weight[:, share].contiguous(), bias


def _moved(run: slice, by: int) -> slice:
    return slice(run.start + by, run.stop + by)


def _parts(tensors: Mapping[str, Tensor], name: str, runs: Sequence[slice]) -> tuple[Part, ...]:
    """Views of the runs; runs that touch are one: with one shard a product has one part, the whole."""
    joined: list[slice] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = slice(joined[-1].start, run.stop)
        else:
            joined.append(run)
    weight, bias = product(tensors, name), tensors.get(f"{name}_bias")
    return tuple((weight[run], None if bias is None else bias[run]) for run in joined)
