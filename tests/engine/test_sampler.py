"""The sampler against its slow twin: transformers' processors, one after the other over the whole vocabulary, then all noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diptych.core.sampling import SamplingParams
from diptych.engine import sampler
from diptych.engine.batch import Draw, Row
from diptych.kernels.noise import Noise
from diptych.kernels.penalties import Seen
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY = 300
ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(64),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    top_k=st.sampled_from([0, 3, 50]),
    seed=st.integers(0, 2**64 - 1),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100, width=32), max_size=5).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
)


def sample(*asked):
    """What is drawn, as this host is told it."""
    sampled = sampler.sample(*asked)
    return sampled.drawn(sampled.numbers.tolist())


def slow(logits: torch.Tensor, draw: Draw, history: list[int]) -> int:
    import transformers as t

    sampling, scores = draw.sampling, logits[None].clone()
    for token, bias in sampling.logit_bias:
        scores[0, token] += bias
    if sampling.repetition_penalty != 1.0 and history:
        scores = t.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(torch.tensor([history]), scores)
    output = history[len(history) - draw.index :]
    for token in set(output):
        scores[0, token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    for token in draw.banned:
        scores[0, token] = -torch.inf
    if sampling.greedy:
        return int(scores.argmax())
    scores = t.TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = t.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = t.TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = t.MinPLogitsWarper(sampling.min_p)(None, scores)
    return int((scores[0] + Noise(sampling.seed or 0, draw.choice, draw.index).of_all(VOCABULARY)).argmax())


@given(st.integers(0, 10_000), samplings, ids, ids, st.sets(st.integers(0, VOCABULARY - 1), max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_draw_is_that_of_the_slow_twin(seed, sampling, prompt, output, banned):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    history = [1, *prompt, *output]
    draw = Draw(sampling, len(output), history=tuple(history), banned=frozenset(banned))
    before = logits.clone()
    ((drawn,),) = sample(logits[None], [(draw,)], [(Seen(history, len(output)) if sampling.penalised else None,)])
    assert drawn.token_id == slow(logits, draw, history)
    assert torch.equal(logits, before), "log-probabilities are of the logits as they were"


wanted = st.tuples(samplings, st.sampled_from([None, 0, 1, 5]), ids, ids, st.sets(st.integers(0, VOCABULARY - 1), max_size=5))


@given(
    st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16]), st.lists(st.lists(wanted, min_size=1, max_size=2), max_size=5)
)
@settings(max_examples=25, deadline=None)
def test_a_mixed_batch_is_drawn_as_each_of_its_draws_alone(seed, dtype, rows):
    """Greedy beside sampled, limits, penalties, biases and bans, log-probabilities for some; several draws from one row."""
    rows = rows or [[(SamplingParams(temperature=0.0), None, [], [], set())]]
    logits = (torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)
    draws, seen, expected, tops = [], [], [], []
    for row, each in zip(logits, rows, strict=True):
        histories = [([1, *prompt, *output], len(output)) for _, _, prompt, output, _ in each]
        made = [
            Draw(replace(sampling, logprobs=logprobs), count, choice, tuple(history), frozenset(banned))
            for choice, ((sampling, logprobs, _, _, banned), (history, count)) in enumerate(zip(each, histories, strict=True))
        ]
        draws.append(made)
        seen.append([Seen(*history) if draw.sampling.penalised else None for draw, history in zip(made, histories, strict=True)])
        expected.append([slow(row.float(), draw, history) for draw, (history, _) in zip(made, histories, strict=True)])
        tops.append(row.float().log_softmax(0))
    answers = sample(logits, draws, seen)
    assert [[drawn.token_id for drawn in each] for each in answers] == expected
    for row, made, each in zip(tops, draws, answers, strict=True):
        for draw, drawn in zip(made, each, strict=True):
            count = draw.sampling.logprobs
            assert (drawn.logprob is None) == (count is None)
            assert [value for _, value in drawn.top] == pytest.approx(row.topk(count or 0).values.tolist(), abs=1e-4)
            assert drawn.logprob is None or drawn.logprob == pytest.approx(float(row[drawn.token_id]), abs=1e-4)


def test_penalties_follow_the_slot_while_steps_are_in_flight(bench, prompt, tiny_llama_dir):
    """Rows that take the last drawn token count it; rows that bring their history count the same."""
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.8, frequency_penalty=0.9, logprobs=0)
    ids = prompt(20)
    taken, given_ = bench(tiny_llama_dir), bench(tiny_llama_dir)
    tables, others = taken.table(60), given_.table(60)
    first = taken.step(Row(1, 0, tuple(ids), tables, (Draw(sampling, 0, history=tuple(ids)),)))[0].token_id
    one = [first, *(taken.step(Row(1, 19 + i, (), tables, (Draw(sampling, i),)))[0].token_id for i in range(1, 30))]
    other = list(ids)
    for index in range(30):
        row = Row(
            1,
            0 if not index else 19 + index,
            tuple(ids) if not index else (other[-1],),
            others,
            (Draw(sampling, index, history=tuple(other)),),
        )
        other.append(given_.step(row)[0].token_id)
    assert one == other[20:]
    greedy = [drawn.token_id for drawn in bench(tiny_llama_dir).generate(ids, 30)]
    assert one != greedy


def test_banned_tokens_are_not_drawn_but_their_logprobs_are_told():
    logits = torch.tensor([[1.0, 9.0, 2.0]])
    ((drawn,),) = sample(logits, [(Draw(SamplingParams(temperature=0.0, logprobs=1), 0, banned=frozenset({1})),)], [(None,)])
    assert drawn.token_id == 2
    assert drawn.top[0][0] == 1
