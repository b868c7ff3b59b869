"""Drawing: the noise is a function of its key alone, the frequencies are the softmax's, the limits are transformers'."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from diptych.kernels.noise import GROUP, Noise
from diptych.kernels.sampling import draw, draw_at_once, draw_torch, log_probabilities, survivors
from hypothesis import given, settings
from hypothesis import strategies as st


def test_noise_of_some_tokens_is_the_noise_of_all():
    noise = Noise(seed=2**63 + 5, choice=1, index=77)
    whole = noise.of_all(1003)
    tokens = torch.cat((torch.randperm(1003)[:50], whole.topk(20).indices))
    assert torch.equal(noise.of(tokens), whole[tokens])
    assert torch.equal(noise.of_all(64 * 600 + 3)[:1003], whole)


def test_noise_differs_by_seed_choice_and_index():
    base = Noise(1, 0, 0).of_all(64)
    for other in (Noise(2, 0, 0), Noise(1, 1, 0), Noise(1, 0, 1), Noise(1 + 2**32, 0, 0)):
        assert not torch.equal(base, other.of_all(64))
    assert torch.equal(base, Noise(1, 0, 0).of_all(64))


def test_noise_is_gumbel():
    values = torch.cat([Noise(3, 0, index).of_all(262_144) for index in range(4)]).double()
    assert torch.isfinite(values).all()
    assert values.mean() == pytest.approx(0.5772, abs=0.005)
    assert values.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.005)
    for point in (-1.0, 0.0, 1.0, 3.0, 8.0):
        assert (values < point).double().mean() == pytest.approx(math.exp(-math.exp(-point)), abs=0.002)


def test_noise_of_a_group_is_independent():
    """Of independent noise the largest is anywhere equally often, and neighbours do not follow each other, nor the largest."""
    noise = torch.cat([Noise(8, 0, index).of_all(64 * GROUP).view(-1, GROUP) for index in range(64)]).double()
    assert torch.bincount(noise.argmax(1), minlength=GROUP).double().std() < 12  # 64 of each: a standard deviation of 8
    assert noise.max(1).values.mean() == pytest.approx(math.log(GROUP) + 0.5772, abs=0.08)
    assert noise.max(1).values.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.08)
    correlations = torch.corrcoef(noise.T) - torch.eye(GROUP)
    assert correlations.abs().max() < 5 / math.sqrt(len(noise))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.sampled_from([1, 5, GROUP, GROUP + 1, 1000, 6000]),
    st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 40.0]),
    st.sampled_from([0.0, 0.3, 0.999]),
)
def test_a_draw_without_most_of_the_noise_is_the_draw_with_all_of_it(seed, vocabulary, spread, banned):
    generator = torch.Generator().manual_seed(seed % 2**60)
    logits = torch.randn(vocabulary, generator=generator) * spread
    logits[torch.rand(vocabulary, generator=generator) < banned] = -torch.inf
    for index, dtype in product(range(3), (torch.float32, torch.bfloat16, torch.float16)):
        noise, given_ = Noise(seed, 1, index), logits.to(dtype)
        expected = int((given_.float() / 0.8 + noise.of_all(vocabulary)).argmax())
        assert draw(given_, noise, temperature=0.8, top_k=0, top_p=1.0) == expected
        assert draw_torch(given_, noise, 0.8) == expected


@pytest.mark.parametrize("limits", [(0, 0.97, 0.0), (0, 1.0, 1e-4), (0, 1.0, 0.1), (3000, 1.0, 0.0), (5000, 0.99, 1e-5)])
def test_many_survivors_and_few_draw_alike(limits):
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(2)) * 2
    top_k, top_p, min_p = limits
    values, tokens = survivors(logits, top_k, top_p, min_p)
    for index in range(20):
        noise = Noise(1, 0, index)
        expected = int(tokens[(values + noise.of_all(6000)[tokens]).argmax()])
        assert draw(logits, noise, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "limits",
    [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (9999, 0.999, 0.0), (20, 0.8, 0.01), (0, 1.0, 0.1), (0, 1e-6, 0.0), (0, 0.95, 0.9)],
)
def test_a_draw_at_once_is_the_same(limits, device):
    top_k, top_p, min_p = limits
    for index in range(40):
        logits = torch.randn(6000, generator=torch.Generator().manual_seed(index)) * (0.5 + index % 4)
        noise = Noise(2**64 - index - 1, 1, index)
        token = draw_at_once((logits / 0.8).to(device), noise, top_k=top_k, top_p=top_p, min_p=min_p)
        assert int(token) == int(draw(logits, noise, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p))


def test_of_equal_sums_the_first_wins_and_a_broken_model_breaks_no_draw():
    inf, nan = math.inf, math.nan
    for logits, token in (([-inf] * 200, 0), ([0.0] * 130 + [inf] * 70, 130), ([0.0] * 99 + [nan] * 101, 99)):
        assert draw(torch.tensor(logits), Noise(1, 0, 0), temperature=1.0, top_k=0, top_p=1.0) == token


def test_frequencies_are_those_of_the_softmax():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        drawn = [draw(logits, Noise(9, 0, i), temperature=temperature, top_k=0, top_p=1.0) for i in range(2500)]
        expected = (logits / temperature).softmax(0)
        seen = torch.bincount(torch.tensor(drawn), minlength=5) / 2500
        torch.testing.assert_close(seen, expected, atol=0.03, rtol=0)


def transformers_survivors(logits, top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = logits[None]
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1.0, 4.0, 0.05]),
    st.sampled_from([0, 1, 2, 50, 9999]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
)
def test_survivors_are_those_of_transformers(seed, spread, top_k, top_p):
    if not top_k and top_p == 1.0:
        return
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * spread
    values, tokens = survivors(logits, top_k, top_p)
    ours, theirs = set(tokens.tolist()), transformers_survivors(logits, top_k, top_p)
    assert torch.equal(logits[tokens], values)
    # Sums in another order may move the edge of the nucleus by the tokens whose probability is the rounding of the sum.
    assert len(ours ^ theirs) <= max(1, len(theirs) // 500)


def test_top_k_beyond_the_vocabulary_and_a_nucleus_of_one():
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert survivors(logits, 100, 1.0)[1].tolist() == [1, 2, 0]
    assert survivors(logits, 0, 1e-9)[1].tolist() == [1]


def test_a_wide_nucleus_needs_the_whole_vocabulary():
    logits = torch.zeros(40_000)
    assert len(survivors(logits, 0, 0.9)[1]) == pytest.approx(36_000, abs=50)


def test_top_k_does_not_change_the_noise_of_those_it_lets_through():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 8
    free = [int(draw(logits, Noise(4, 0, i), temperature=1.0, top_k=0, top_p=1.0)) for i in range(50)]
    likely = set(logits.topk(20).indices.tolist())
    assert [draw(logits, Noise(4, 0, i), temperature=1.0, top_k=20, top_p=1.0) for i in range(50) if free[i] in likely] == [
        token for token in free if token in likely
    ]


def test_log_probabilities_are_of_the_raw_distribution():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 3
    expected = logits.log_softmax(0)
    logprob, top = log_probabilities(logits, 17, 4)
    assert logprob == pytest.approx(float(expected[17]), abs=1e-5)
    assert [token for token, _ in top] == expected.topk(4).indices.tolist()
    assert [value for _, value in top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)
    assert log_probabilities(logits, 17, 0)[1] == ()
