"""The rulers themselves: percentiles, arrival times, gaps between tokens, the sorting of a process's memory."""

from __future__ import annotations

import os

import pytest
from diptych.benchmarks.memory import private, smaps
from diptych.benchmarks.open_loop import Answer, arrivals, prompt
from diptych.benchmarks.record import percentile, summary
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_a_summary_is_in_milliseconds() -> None:
    assert summary([0.001, 0.003]) == {"count": 2, "mean_ms": 2.0, "p50_ms": 1.0, "p90_ms": 3.0, "p99_ms": 3.0, "max_ms": 3.0}


def test_nothing_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_arrivals_are_a_poisson_process_and_repeat() -> None:
    times = arrivals(2.0, 1000.0, seed=3)
    assert times == sorted(times) == arrivals(2.0, 1000.0, seed=3)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert 0 < times[0] < times[-1] < 1000


def test_prompts_share_no_prefix() -> None:
    assert len({prompt(16, number, 1000)[:4] for number in range(100)}) == 100


def test_what_an_answer_tells() -> None:
    answer = Answer(sent=0.0, arrivals=[0.5, 0.75, 1.0, 1.5])
    assert (answer.ttft, answer.gap) == (0.5, 0.25)
    assert answer.itl == [0.25, 0.5]
    assert answer.tpot == pytest.approx(1 / 3)


def test_all_memory_of_a_process_is_sorted() -> None:
    kinds = smaps(os.getpid())
    assert kinds["weights"]["Rss"] == kinds["pool"]["Rss"] == 0
    assert 0 < private(kinds["rest"]) <= kinds["rest"]["Rss"]
