"""Penalties are those of transformers and of OpenAI's formula, however the history came in."""

from __future__ import annotations

import torch
from diptych.kernels.penalties import Seen
from diptych.kernels.penalties import penalise as penalise_all
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY = 50
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


def penalise(logits: torch.Tensor, seen: Seen, *, repetition: float, presence: float, frequency: float) -> None:
    """The second of three rows is changed, and no other."""
    rows = torch.stack((logits, logits, logits))
    penalise_all(rows, [seen], torch.tensor([1]), torch.tensor([[repetition, presence, frequency]]))
    assert torch.equal(rows[0], logits)
    assert torch.equal(rows[2], logits)
    logits.copy_(rows[1])


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


@given(st.integers(0, 99), tokens.filter(bool), st.floats(0.1, 3.0))
@settings(max_examples=40, deadline=None)
def test_repetition_is_that_of_transformers(seed, history, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = logits_of(seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits[None].clone())[0]
    penalise(logits, Seen(history, 0), repetition=penalty, presence=0.0, frequency=0.0)
    torch.testing.assert_close(logits, theirs)


@given(st.integers(0, 99), tokens, tokens, st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_presence_and_frequency_count_the_output_only(seed, prompt, output, presence, frequency):
    logits = logits_of(seed)
    expected = logits.clone()
    for token in range(VOCABULARY):
        expected[token] -= frequency * output.count(token) + presence * (token in output)
    penalise(logits, Seen(prompt + output, len(output)), repetition=1.0, presence=presence, frequency=frequency)
    torch.testing.assert_close(logits, expected)


@given(st.integers(0, 99), tokens.filter(bool), tokens, st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_one_token_after_the_other_is_the_whole_history_at_once(seed, prompt, output, there, data):
    """Also where the host does not know the tokens, and some are twice among those that count."""
    known = data.draw(st.integers(0, len(output)))
    whole, grown = logits_of(seed), logits_of(seed)
    seen = Seen(prompt + output[:known], known)
    for token in output[known:]:
        seen.add_there(torch.tensor([token])) if there else seen.add(token)
    factors = {"repetition": 1.3, "presence": 0.7, "frequency": 0.4}
    penalise(whole, Seen(prompt + output, len(output)), **factors)
    penalise(grown, seen, **factors)
    assert torch.equal(whole, grown), "to the last bit: paths differ in where a history begins"
