"""Drawing: the noise is a function of its key alone, the frequencies are the softmax's, the limits are transformers'."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from diptych.kernels.noise import GROUP, Noise
from diptych.kernels.sampling import Ask, draw_torch, edges_sorted, limits_of, log_probabilities
from diptych.kernels.sampling import draw as draw_all
from hypothesis import given, settings
from hypothesis import strategies as st
from row_by_row import one as draw
from row_by_row import slow, survivors


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
        assert draw_torch(given_, Ask(0, noise, 0.8)) == expected


@pytest.mark.parametrize("limits", [(0, 0.97, 0.0), (0, 1.0, 1e-4), (0, 1.0, 0.1), (3000, 1.0, 0.0), (5000, 0.99, 1e-5)])
def test_many_survivors_and_few_draw_alike(limits):
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(2)) * 2
    top_k, top_p, min_p = limits
    values, tokens = survivors(logits, top_k, top_p, min_p)
    for index in range(20):
        noise = Noise(1, 0, index)
        expected = int(tokens[(values + noise.of_all(6000)[tokens]).argmax()])
        assert draw(logits, noise, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p) == expected


asks = st.builds(
    Ask,
    row=st.integers(0, 3),
    noise=st.builds(Noise, seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 2), index=st.integers(0, 99)),
    temperature=st.sampled_from([0.3, 0.8, 1, 2.0]),  # clients write whole numbers, too
    top_k=st.sampled_from([0, 0, 1, 7, 50, 1200, 9999]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**60),
    st.sampled_from([1, 5, GROUP + 1, 1003, 6000]),
    st.sampled_from([0.5, 3.0, 10.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(asks, min_size=1, max_size=6),
)
def test_draws_in_one_go_are_those_made_row_by_row(seed, vocabulary, spread, dtype, wanted):
    """Rows that many draw from and rows that none does, with limits and without; in bf16 many logits at the edge are equal."""
    logits = (torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)
    expected = [slow(logits, ask) for ask in wanted]
    assert draw_all(logits, wanted).tolist() == expected
    limits = limits_of(logits, wanted)
    assert [int(draw_torch(logits[ask.row], ask, (limits[0][i], limits[1][i]))) for i, ask in enumerate(wanted)] == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**60), st.sampled_from([torch.float32, torch.bfloat16]), st.lists(asks, min_size=1, max_size=4))
def test_limits_that_a_device_finds_without_the_host_are_the_same(seed, dtype, wanted):
    logits = (torch.randn(4, 3000, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    floors, lasts = limits_of(logits, wanted)
    limited = [i for i, ask in enumerate(wanted) if ask.limited]
    if limited:
        for place, floor, last in zip(limited, *edges_sorted(logits, [wanted[i] for i in limited]), strict=True):
            one, other = (let_through(logits[wanted[place].row], *each) for each in ((floor, last), (floors[place], lasts[place])))
            # Sums in another order may move the edge of the nucleus by the tokens whose probability is the rounding of the sum.
            assert abs(one - other) <= (max(1, one // 500) if wanted[place].top_p < 1.0 else 0)


def let_through(row, floor, last):
    return int(((row > floor) | ((row == floor) & (torch.arange(len(row)) <= last))).sum())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_draws_the_same(dtype):
    for index in range(40):
        logits = (torch.randn(3, 6000, generator=torch.Generator().manual_seed(index)) * (0.5 + index % 4)).to(dtype)
        limits = [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (9999, 0.999, 0.0), (20, 0.8, 0.01), (0, 1.0, 0.1), (0, 1e-6, 0.0)]
        wanted = [Ask(i % 3, Noise(2**64 - index - 1, i, index), 0.8, *each) for i, each in enumerate(limits)]
        assert draw_all(logits.cuda(), wanted).tolist() == draw_all(logits, wanted).tolist()


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
    ((own, total, *rest),) = log_probabilities(logits[None], torch.tensor([0]), torch.tensor([17]), 4).tolist()
    assert own - total == pytest.approx(float(expected[17]), abs=1e-5)
    assert rest[4:] == expected.topk(4).indices.tolist()
    assert [value - total for value in rest[:4]] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)
    assert log_probabilities(logits[None], torch.tensor([0]), torch.tensor([17]), 0).shape == (1, 2)
