"""The paged kernels against twins that look up one position at a time."""

from __future__ import annotations

import random

import pytest
import torch
from diptych.kernels.kv_store import store_kv, store_rows
from diptych.kernels.paged_attention import Paging, attend, make_chunk, make_singles

BLOCK, HEAD_DIM = 16, 8


def slow_attend(query, keys, values, position, window, scale, softcap=0.0):
    """One query [heads, head_dim] over keys and values [positions, kv_heads, head_dim] of its sequence."""
    group = query.shape[0] // keys.shape[1]
    out = []
    for head, q in enumerate(query):
        seen = [p for p in range(position + 1) if not window or p > position - window]
        scores = torch.stack([q @ keys[p, head // group] * scale for p in seen])
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        out.append(sum(share * values[p, head // group] for share, p in zip(scores.softmax(0), seen, strict=True)))
    return torch.stack(out)


class Sequence:
    """A sequence with random KV in scattered blocks."""

    def __init__(self, length, kv_heads, cache, free):
        self.table = [free.pop() for _ in range(-(-length // BLOCK))]
        self.keys, self.values = torch.randn(2, length, kv_heads, HEAD_DIM)
        at = torch.arange(length)
        rows = store_rows(torch.tensor(self.table)[at // BLOCK], at % BLOCK, kv_heads=kv_heads, block_size=BLOCK)
        store_kv(cache, self.keys, self.values, rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (24, 0.0), (40, 0.0), (24, 0.7)])
def test_chunks_and_singles_equal_the_slow_twin(heads, kv_heads, window, softcap):
    torch.manual_seed(window)
    cache = torch.full((64, kv_heads, 2, BLOCK, HEAD_DIM), 9.0)
    free = random.Random(0).sample(range(64), 64)
    paging = Paging(kv_heads=kv_heads, block_size=BLOCK, window=window)
    long, *short = [Sequence(length, kv_heads, cache, free) for length in (200, 33, 50, 1)]
    # One chunk longer than a tile in the middle of a sequence, and three sequences' last tokens, one of them its first.
    start, length = 45, 150
    query = torch.randn(length + 3, heads, HEAD_DIM)
    ends = [len(each.keys) - 1 for each in short]
    spans = [
        make_chunk(1, start, length, long.table, paging),
        make_singles([0, length + 1, length + 2], ends, [each.table for each in short], paging, torch.float32),
    ]
    out = attend(query, cache, spans, 0.3, softcap).view(query.shape)
    for token, sequence, position in [(0, short[0], ends[0]), (length + 1, short[1], ends[1]), (length + 2, short[2], ends[2])]:
        torch.testing.assert_close(out[token], slow_attend(query[token], sequence.keys, sequence.values, position, window, 0.3, softcap))
    for i in range(0, length, 7):
        expected = slow_attend(query[1 + i], long.keys, long.values, start + i, window, 0.3, softcap)
        torch.testing.assert_close(out[1 + i], expected, atol=1e-5, rtol=1e-5)


def test_storing_touches_only_the_rows_it_names():
    cache = torch.zeros(4, 2, 2, BLOCK, HEAD_DIM)
    keys, values = torch.randn(2, 3, 2, HEAD_DIM)
    blocks, offsets = torch.tensor([3, 1, 3]), torch.tensor([15, 0, 2])
    store_kv(cache, keys, values, store_rows(blocks, offsets, kv_heads=2, block_size=BLOCK))
    expected = torch.zeros_like(cache)
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        expected[block, :, 0, offset], expected[block, :, 1, offset] = keys[token], values[token]
    assert torch.equal(cache, expected)
