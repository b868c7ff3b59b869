"""The likeliest tokens and the sum over all, against torch's."""

from __future__ import annotations

import pytest
import torch
from diptych.kernels.likeliest import SPAN, likeliest, likeliest_torch, log_total, log_total_torch
from diptych.kernels.native import native
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**60),
    st.sampled_from([1, SPAN - 1, SPAN, 1003, 70_000]),
    st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    st.sampled_from([0.0, 0.5, 0.999]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 5, 15, 1000]),
)
def test_as_torch_finds_them(seed, vocabulary, spread, banned, dtype, count):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(vocabulary, generator=generator) * spread).to(dtype)
    logits[torch.rand(vocabulary, generator=generator) < banned] = -torch.inf
    count = min(count, vocabulary)
    values, tokens = likeliest(logits, count, 0.7)
    assert torch.equal(values, likeliest_torch(logits, count, 0.7)[0])
    assert torch.equal(values, (logits.float() / 0.7)[tokens])
    assert len(set(tokens.tolist())) == count
    assert float(log_total(logits, 0.7)) == pytest.approx(float(log_total_torch(logits, 0.7)), rel=2e-6, abs=2e-6)


@pytest.mark.skipif(native() is None, reason="no C++ compiler; torch names any of them")
def test_of_equal_ones_the_first():
    logits = torch.zeros(6400, dtype=torch.bfloat16)
    logits[3000] = 1.0
    assert likeliest(logits, 4)[1].tolist() == [3000, 0, 1, 2]


def test_what_is_no_number_is_left_to_torch():
    logits = torch.full((SPAN * 4,), torch.nan)
    assert likeliest(logits, 3)[0].isnan().all()
