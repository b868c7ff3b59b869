"""Sampling parameters are checked once, and the error names the field."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from diptych.core.errors import InvalidRequest
from diptych.core.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams

VOCABULARY = 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 101.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("stop_token_ids", (VOCABULARY,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1,) * (MAX_STOP_TOKEN_IDS + 1)),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("logit_bias", ((VOCABULARY, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((2, 1.0), (1, 1.0))),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", ((1, 1.0),) * (MAX_LOGIT_BIAS + 1)),
        ("min_tokens", -1),
        ("min_tokens", 17),  # max_tokens is 16
    ],
)
def test_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(SamplingParams(), **{field: value}).validate(VOCABULARY)
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", 10**9),  # legal; the context decides how many are drawn
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1.0),
        ("top_p", 1e-9),
        ("top_k", 2**31 - 1),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("stop_token_ids", (0, VOCABULARY - 1)),
        ("min_p", 1.0),
        ("repetition_penalty", 1e-3),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("logit_bias", ((0, -100.0), (VOCABULARY - 1, 100.0))),
        ("min_tokens", 16),
    ],
)
def test_in_range_is_accepted(field: str, value: object) -> None:
    replace(SamplingParams(), **{field: value}).validate(VOCABULARY)


def test_zero_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams().greedy


def test_what_ends_the_output() -> None:
    assert SamplingParams(stop_token_ids=(5,)).ends(frozenset({1})) == {1, 5}
    assert SamplingParams(stop_token_ids=(5,), ignore_eos=True).ends(frozenset({1})) == {5}
