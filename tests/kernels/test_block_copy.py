"""Copying blocks against a loop over snapshots."""

from __future__ import annotations

import pytest
import torch
from diptych.kernels.block_copy import copy_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

pairs = st.lists(st.integers(0, 7), unique=True, max_size=8).flatmap(
    lambda to: st.tuples(st.lists(st.integers(0, 7), min_size=len(to), max_size=len(to)), st.just(to))
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(pairs=pairs)
def test_copies_are_made_as_if_at_once(pairs: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    sources, destinations = pairs
    cache = torch.randn(8, 2, 2, 4, 3).to(dtype)
    expected = cache.clone()
    for source, destination in zip(sources, destinations, strict=True):
        expected[destination] = cache[source]
    copy_blocks(cache, torch.tensor(sources, dtype=torch.int64), torch.tensor(destinations, dtype=torch.int64))
    assert torch.equal(cache, expected)
