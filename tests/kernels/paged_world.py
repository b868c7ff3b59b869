"""Sequences in a paged cache full of NaN, and attention over them written out."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from diptych.kernels.int8_rows import decode, encode, width
from diptych.kernels.kv_store import store_kv, store_rows
from torch import Tensor

BLOCK = 16


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_attend(query: Tensor, keys: Tensor, values: Tensor, first: int, last: int, scale: float, softcap: float) -> Tensor:
    """One query [heads, head_dim] over positions first to last of keys and values [positions, kv_heads, head_dim], in fp64."""
    group = len(query) // keys.shape[1]
    keys, values = (each[first : last + 1].double().repeat_interleave(group, 1) for each in (keys, values))
    scores = torch.einsum("hd,khd->hk", query.double(), keys) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values)


class World:
    """A cache in which everything is NaN but the keys and values of its sequences, which lie scattered. `kv`: what is read of them."""

    def __init__(
        self,
        lengths: Sequence[int],
        kv_heads: int,
        head_dim: int,
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
        held: torch.dtype | None = None,
    ) -> None:
        """`held`: what the cache is of, if not of `dtype`."""
        blocks = max(100, sum(-(-length // BLOCK) for length in lengths))
        self.free = random.Random(seed).sample(range(blocks), blocks)
        if held is torch.int8:  # where two bytes of ones are a scale that is NaN
            self.cache = torch.full((blocks, kv_heads, 2, BLOCK, width(head_dim)), -1, dtype=held)
        else:
            self.cache = torch.full((blocks, kv_heads, 2, BLOCK, head_dim), torch.nan, dtype=dtype)
        self.tables = [[self.free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
        self.kv = [randn(2, length, kv_heads, head_dim, seed=seed + i).to(dtype) for i, length in enumerate(lengths)]
        for table, (keys, values) in zip(self.tables, self.kv, strict=True):
            at = torch.arange(len(keys))
            rows = store_rows(torch.tensor(table)[at // BLOCK], at % BLOCK, kv_heads=kv_heads, block_size=BLOCK)
            store_kv(self.cache, keys, values, rows)
        if held is torch.int8:
            self.kv = [decode(encode(each), dtype) for each in self.kv]
