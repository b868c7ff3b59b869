"""Attention of several new tokens a row by the C++ kernel, against sums written out in fp64: scattered blocks, everything else NaN."""

from __future__ import annotations

import pytest
import torch
from diptych.kernels.attend_chunks import make_paged_chunks
from diptych.kernels.attend_singles import make_paged_singles
from diptych.kernels.native import native
from diptych.kernels.paged_attention import attend
from diptych.kernels.paging import Paging
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paged_world import BLOCK, World, randn, slow_attend

pytestmark = pytest.mark.skipif(native() is None, reason="no C++ kernels here")
chunks_ = st.lists(st.tuples(st.integers(0, 200), st.integers(2, 90)), min_size=1, max_size=3)
"""Where each begins in its sequence, and how many tokens it has."""


class Step:
    """Chunks side by side, with one token between them that is another span's."""

    def __init__(self, chunks, kv_heads, group, head_dim, window, seed, held=None):
        self.chunks, self.paging = chunks, Paging(kv_heads, BLOCK, window)
        self.world = World([start + length for start, length in chunks], kv_heads, head_dim, seed, held=held)
        self.places = [sum(length for _, length in chunks[:row]) + row for row in range(len(chunks))]
        self.query = randn(self.places[-1] + chunks[-1][1], kv_heads * group, head_dim, seed=seed + 9).bfloat16()

    def long(self, row):
        """Blocks that have left the window are -1, as in an engine's tables."""
        (start, length), table = self.chunks[row], self.world.tables[row]
        first = self.paging.first_block(start)
        return (self.places[row], start, length, [-1] * first + table[first:])

    def attended(self, rows, softcap, threads=1):
        span = make_paged_chunks([self.long(row) for row in rows], self.paging)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)  # every `torch.empty` is NaN
        try:
            return attend(self.query, self.world.cache, [span], 0.3, softcap).view(self.query.shape)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(1)

    def outside_is_poisoned(self):
        """Also what lies before the first key that is seen, in the block that has that key."""
        for (start, _), table in zip(self.chunks, self.world.tables, strict=True):
            first = self.paging.first_block(start)
            self.world.cache[table[first], :, :, : self.paging.first_key(start) - first * BLOCK] = torch.nan


@settings(deadline=None, max_examples=25)
@given(
    chunks_, st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 60), st.sampled_from([0.0, 0.7]), st.integers(0, 99)
)
@example([(45, 150)], 1, 4, 16, 0, 0.0, 1)
@example([(600, 70)], 1, 70, 2, 512, 0.0, 2)
def test_chunks_equal_the_slow_twin(chunks, kv_heads, group, sixteens, window, softcap, seed):
    step = Step(chunks, kv_heads, group, 16 * sixteens, window, seed)
    step.outside_is_poisoned()
    out = step.attended(range(len(chunks)), softcap)
    for row, (place, (start, length)) in enumerate(zip(step.places, chunks, strict=True)):
        for i in {0, 1, length // 3, length - 2, length - 1}:
            expected = slow_attend(step.query[place + i], *step.world.kv[row], step.paging.first_key(start + i), start + i, 0.3, softcap)
            torch.testing.assert_close(out[place + i].double(), expected, rtol=2.0**-6, atol=1e-2)
        assert torch.equal(step.attended([row], softcap)[place : place + length], out[place : place + length]), "whoever is beside it"
    between = [place - 1 for place in step.places[1:]]
    assert out[between].isnan().all(), "rows of another span are not touched"


def test_two_threads_compute_the_same():
    step = Step([(0, 130), (30, 70)], 2, 3, 48, 50, 5)
    assert torch.equal(step.attended([0, 1], 0.0)[:130], step.attended([0, 1], 0.0, threads=2)[:130])


@pytest.mark.parametrize("window", [0, 40])
def test_an_int8_cache_is_read_as_its_numbers(window):
    step = Step([(20, 70), (0, 33)], 2, 2, 64, window, 3, torch.int8)
    plain = Step([(20, 70), (0, 33)], 2, 2, 64, window, 3)
    at = torch.arange(90)
    for row, (keys, values) in enumerate(step.world.kv):
        table = torch.tensor(plain.world.tables[row])[at[: len(keys)] // BLOCK]
        plain.world.cache[table, :, 0, at[: len(keys)] % BLOCK] = keys
        plain.world.cache[table, :, 1, at[: len(keys)] % BLOCK] = values
    out, expected = step.attended([0, 1], 0.0), plain.attended([0, 1], 0.0)
    assert torch.equal(out.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_scores_far_apart_and_the_same():
    """A softmax over chunks of keys of which a later one outweighs all before, and over keys that are all alike."""
    step = Step([(0, 300)], 1, 2, 32, 0, 4)
    keys, values = step.world.kv[0]
    keys[:] = 0.0
    keys[290] = 60.0 * torch.sign(step.query[295, 0].float()).bfloat16()[None]
    at = torch.arange(300)
    table = torch.tensor(step.world.tables[0])[at // BLOCK]
    step.world.cache[table, :, 0, at % BLOCK] = keys
    out = step.attended([0], 0.0)
    torch.testing.assert_close(out[295, 0], values[290, 0])
    torch.testing.assert_close(out[200].double(), values[:201].double().mean(0).expand(2, -1), rtol=2.0**-6, atol=1e-2)


def test_chunks_beside_single_rows():
    step = Step([(10, 40), (0, 20)], 1, 4, 32, 24, 8)
    single = make_paged_singles([40], [29], [step.world.tables[0]], step.paging)
    chunks = make_paged_chunks([step.long(0), step.long(1)], step.paging)
    out = attend(step.query, step.world.cache, [chunks, single], 0.3).view(step.query.shape)
    assert not out.isnan().any()
    expected = slow_attend(step.query[40], *step.world.kv[0], 6, 29, 0.3, 0.0)
    torch.testing.assert_close(out[40].double(), expected, rtol=2.0**-6, atol=1e-2)
