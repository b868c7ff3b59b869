"""The likeliest tokens and the sum over all, against torch's."""

from __future__ import annotations

import torch
from diptych.kernels.likeliest import SPAN, likeliest, likeliest_torch, log_totals, log_totals_torch
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
    logits = (torch.randn(3, vocabulary, generator=generator) * spread).to(dtype)
    logits[torch.rand(3, vocabulary, generator=generator) < banned] = -torch.inf
    count, rows, temperatures = min(count, vocabulary), torch.tensor([2, 0]), torch.tensor([0.7, 1.3])
    values, tokens = likeliest(logits, rows, count, temperatures)
    expected, named = likeliest_torch(logits, rows, count, temperatures)
    assert torch.equal(values, expected)
    assert torch.equal(tokens, named)
    assert torch.equal(values, (logits[rows].float() / temperatures[:, None]).topk(count).values)
    torch.testing.assert_close(
        log_totals(logits, rows, temperatures), log_totals_torch(logits, rows, temperatures), rtol=2e-6, atol=2e-6, equal_nan=True
    )


def one(logits, count):
    values, tokens = likeliest(logits[None], torch.tensor([0]), count, torch.ones(1))
    return values[0], tokens[0]


def test_of_equal_ones_the_first():
    logits = torch.zeros(6400, dtype=torch.bfloat16)
    logits[3000] = 1.0
    assert one(logits, 4)[1].tolist() == [3000, 0, 1, 2]


def test_what_is_no_number_is_left_to_torch():
    logits = torch.full((SPAN * 4,), torch.nan)
    assert one(logits, 3)[0].isnan().all()
