"""Runs that others measured on their hardware, by the tolerance that is promised of all of them, simulated with what a
plan says and nothing else (`benchmarks/planner`)."""

from __future__ import annotations

import pytest
from diptych.benchmarks.planner.replay import HERE, compare, profile_of, read_traces

RUNS = read_traces(HERE / "runs.json")


@pytest.mark.parametrize(
    ("name", "saturated"), [("distserve-c21d11-300-3", False), ("distserve-c21d11-300-9", True), ("distserve-c21d11-900-9", True)]
)
def test_a_measured_run_is_simulated_within_the_tolerance(name: str, saturated: bool) -> None:
    found = compare(name, profile_of(), RUNS[name])
    assert found.saturated == saturated
    assert found.misses() == []
    assert abs(found.attainment_error) <= 3


def test_a_model_that_is_wrong_by_a_fifth_would_not_pass() -> None:
    wrong = profile_of().model_copy(deep=True)
    slower = tuple(
        each.model_copy(update={"times": each.times.model_copy(update={"step": each.times.step + 0.012})}) for each in wrong.parallelisms
    )
    found = compare("slow", wrong.model_copy(update={"parallelisms": slower}), RUNS["distserve-c21d11-300-3"])
    assert len(found.misses()) >= 2
