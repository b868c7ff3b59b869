"""Arrivals, lengths, files of them, prompts: the same seed makes the same load, of the distribution it says."""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import fmean, pvariance

import pytest
from diptych.cluster.load import arrivals, prompts
from diptych.cluster.load.choice import Load
from diptych.cluster.load.lengths import Range, drawn, parse_range, shuffled
from diptych.cluster.load.workload import Arrival, arrivals_of, limited, read_pairs, read_trace
from diptych.core.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

COUNT = 20_000
RATES = st.floats(0.01, 1000)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variance_of_their_distribution(burstiness: float) -> None:
    times = list(islice(arrivals.gamma(2.0, burstiness, seed=5), COUNT))
    gaps = [late - early for early, late in pairwise([0.0, *times])]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.05)
    assert pvariance(gaps) == pytest.approx(0.25 / burstiness, rel=0.15)


@given(RATES, st.integers(0, 100))
def test_times_rise_repeat_and_scale_with_the_rate(rate: float, seed: int) -> None:
    times = list(islice(arrivals.poisson(rate, seed), 50))
    assert times == sorted(times) == list(islice(arrivals.poisson(rate, seed), 50))
    assert [at * rate for at in times] == pytest.approx(list(islice(arrivals.poisson(1.0, seed), 50)))


@given(RATES)
def test_constant_arrivals_do_not_drift(rate: float) -> None:
    assert next(islice(arrivals.constant(rate), 1000, None)) == 1000 / rate


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 9))
def test_drawn_lengths_stay_in_their_range_and_reach_its_ends(low: int, width: int, seed: int) -> None:
    pairs = list(islice(drawn(Range(low, low + width), Range(1, 1), seed), 60 * (width + 1)))
    assert {output for _, output in pairs} == {1}
    assert {prompt for prompt, _ in pairs} >= {low, low + width}  # the chance that one is not drawn is e^-60
    assert all(low <= prompt <= low + width for prompt, _ in pairs)


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=20), st.integers(0, 9))
def test_shuffled_pairs_come_once_each_a_round(pairs: list[tuple[int, int]], seed: int) -> None:
    rounds = list(islice(shuffled(pairs, seed), 3 * len(pairs)))
    for begin in range(0, len(rounds), len(pairs)):
        assert sorted(rounds[begin : begin + len(pairs)]) == sorted(pairs)


@pytest.mark.parametrize(("text", "found"), [("256", Range(256, 256)), ("1-9", Range(1, 9))])
def test_ranges_are_read(text: str, found: Range) -> None:
    assert parse_range(text, "input") == found


@pytest.mark.parametrize("text", ["", "0", "9-1", "-3", "1-", "a", "1.5", "3-4-5", "²"])
def test_a_wrong_range_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="output") as error:
        parse_range(text, "output")
    assert error.value.field == "output"


@pytest.mark.parametrize(
    "text", ["[[3, 4], [5, 6]]", '{"source": "x", "pairs": [[3, 4], [5, 6]]}', "3,4\n5,6\n", "prompt,output\n3,4\n\n5,6"]
)
def test_files_of_pairs_are_read(text: str) -> None:
    assert read_pairs(text, "f") == [(3, 4), (5, 6)]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[", "[1, 2]", "[[1]]", "[[0, 1]]", "[[1, 2.5]]", "[[true, 1]]", "1,x", "a,b", "1,2,3"])
def test_wrong_files_of_pairs_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="f"):
        read_pairs(text, "f")


def test_traces_are_read_and_begin_at_0() -> None:
    assert read_trace("[1.5, 2, 4]", "f") == [(0.0, None), (0.5, None), (2.5, None)]
    assert read_trace("at,in,out\n10,3,4\n11.5,5,6\n", "f") == [(0.0, (3, 4)), (1.5, (5, 6))]


@pytest.mark.parametrize("text", ["[2, 1]", "[-1]", '["x"]', "[[1, 2]]", "nan", "inf", "[[1, 0, 2]]", "[null]"])
def test_wrong_traces_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="f"):
        read_trace(text, "f")


@given(st.lists(st.floats(0, 100), max_size=30).map(sorted), st.none() | st.integers(0, 40), st.none() | st.floats(0, 100))
def test_limits_are_those_of_the_obvious_way(times: list[float], requests: int | None, seconds: float | None) -> None:
    load = list(arrivals_of(times, [(1, 1)] * len(times)))
    wanted = [arrival for arrival in load if (requests is None or arrival.number < requests) and (seconds is None or arrival.at < seconds)]
    assert list(limited(load, requests, seconds)) == wanted


def test_prompts_repeat_and_share_no_prefix() -> None:
    every = [tuple(prompts.token_ids(16, 1000, 3, number % 2, number // 2)) for number in range(200)]
    assert len({ids[:4] for ids in every}) == 200
    assert every[7] == tuple(prompts.token_ids(16, 1000, 3, 1, 3))
    assert all(prompts.FIRST_ID <= token < 1000 for ids in every for token in ids)
    assert len(prompts.text(40, 3, 0, 1).split()) == 40
    assert prompts.text(40, 3, 0, 1) != prompts.text(40, 3, 1, 1)


def test_a_load_varies_by_variant_and_not_by_call() -> None:
    load = Load(input="8-64", output="4", burstiness=0.5, seed=2)
    first = list(islice(load.arrivals(3.0), 20))
    assert first == list(islice(load.arrivals(3.0), 20))
    assert [arrival.prompt_tokens for arrival in first] != [a.prompt_tokens for a in islice(load.arrivals(3.0, 1), 20)]


def test_a_trace_with_lengths_is_replayed_in_its_order() -> None:
    load = Load.of_trace([(0.0, (3, 4)), (1.0, (5, 6))], input="9")
    load.check()
    assert list(load.arrivals(100.0)) == [Arrival(0, 0.0, 3, 4), Arrival(1, 1.0, 5, 6)]


def test_a_trace_without_lengths_draws_them() -> None:
    assert list(Load.of_trace([(0.0, None), (1.0, None)], input="9", output="2").arrivals(1.0))[1] == Arrival(1, 1.0, 9, 2)


@pytest.mark.parametrize(
    "wrong", [Load(burstiness=0.0), Load(constant=True, burstiness=2.0), Load(times=(0.0,), constant=True), Load(input="x")]
)
def test_a_load_that_contradicts_itself_is_refused(wrong: Load) -> None:
    with pytest.raises(ConfigError):
        wrong.check()


@pytest.mark.parametrize(("moments", "lengths"), [([(0.0, (1, 1))], ((2, 2),)), ([(0.0, (1, 1)), (1.0, None)], ())])
def test_lengths_come_from_one_place(moments: list[tuple[float, tuple[int, int] | None]], lengths: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError):
        Load.of_trace(moments, lengths=lengths)
