"""What counts as another load: changes of rate, lengths and hits do, chance does not."""

from __future__ import annotations

from statistics import fmean

import pytest
from diptych.cluster.autoplan.drift import settled, shifts
from diptych.cluster.autoplan.figures import Figures, arrivals_in, attained
from diptych.cluster.load.slo import Slo
from diptych.core.workload import Recorded, Window
from hypothesis import given, settings
from hypothesis import strategies as st
from windows import joined, window

SEEDS = st.integers(0, 10**6)
LOADS = {
    "poisson": {},
    "bursty": {"burstiness": 0.3},
    "even": {"burstiness": 4.0},
    "slow": {"rate": 0.8},
    "long tails": {"spread": 1.2},
    "half cached": {"hits": 0.5},
}


def figures(of: Window) -> Figures:
    return Figures.of(arrivals_in(of), of.seconds)


@pytest.mark.parametrize("load", LOADS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_chance_is_no_shift(load: str, seed: int) -> None:
    one, other = (window(120, 2 * seed + turn, **LOADS[load]) for turn in range(2))  # type: ignore[arg-type]
    assert shifts(figures(one), figures(other)) == ()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rate": 10.0}, {"rate"}),
        ({"prompt": 100.0}, {"prompt"}),
        ({"output": 80.0}, {"output"}),
        ({"hits": 0.9}, {"hits"}),
        ({"prompt": 100.0, "output": 80.0}, {"prompt", "output"}),
    ],
)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_a_change_is_a_shift_of_that_name(changes: dict[str, float], what: set[str], seed: int) -> None:
    before, after = window(120, 2 * seed), window(120, 2 * seed + 1, **changes)  # type: ignore[arg-type]
    assert {shift.what for shift in shifts(figures(before), figures(after))} == what


def test_a_small_change_is_none_however_sure() -> None:
    before, after = figures(window(2000, 1, rate=20)), figures(window(2000, 2, rate=22, prompt=440))
    assert shifts(before, after) == ()
    assert after.rate.value > before.rate.value * 1.05


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_of_a_load_that_has_changed_only_the_new_part_is_looked_at(seed: int) -> None:
    mixed = joined(window(80, 2 * seed), window(40, 2 * seed + 1, prompt=40, output=200))
    found = settled(arrivals_in(mixed), mixed.seconds, 60)
    if found is not None:
        arrivals, seconds = found
        assert seconds <= 60
        assert all(0 <= arrival.at <= seconds for arrival in arrivals)
        assert fmean(arrival.prompt_tokens for arrival in arrivals[-60:]) < 200


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_a_turn_is_seen_when_somewhat_more_have_come_than_are_judged(seed: int) -> None:
    """Not only when the new load fills half, or a quarter, of the window."""
    answers = window(25, 2 * seed, rate=1.9, burstiness=8.0, prompt=32, output=64, spread=0.1)
    mixed = joined(window(35, 2 * seed + 1, rate=4.0, prompt=448, output=4, spread=0.1), answers)
    found = settled(arrivals_in(mixed), mixed.seconds, 30)
    assert found is not None
    assert fmean(arrival.prompt_tokens for arrival in found[0]) < 100


def test_a_load_that_has_just_changed_is_waited_for() -> None:
    mixed = joined(window(110, 1), window(10, 2, prompt=20, output=900, rate=5))
    assert settled(arrivals_in(mixed), mixed.seconds, 60) is None
    steady = window(120, 3)
    assert settled(arrivals_in(steady), steady.seconds, 60) == (arrivals_in(steady), 120)


def test_what_is_under_way_gets_the_end_of_one_that_was_as_long() -> None:
    """A window holds few of the long answers that have ended: without those under way it would seem to have none."""
    ended = [Recorded(60.0 - each, 100, 0, 10 + 10 * (each % 4), 0.1, 0.02, True) for each in range(40)]
    running = [Recorded(5.0, 100, 0, 25, 0.1, 0.02, False), Recorded(4.0, 100, 0, 90, 0.1, 0.02, False)]
    waiting = [Recorded(1.0, 100, 0, 0, None, None, False)]
    arrivals = arrivals_in(Window(60, (*ended, *running, *waiting)))
    assert [arrival.output_tokens for arrival in arrivals[:40]] == [each.output_tokens for each in ended]
    assert arrivals[40].output_tokens in (30, 40)
    assert arrivals[41].output_tokens == 90
    assert arrivals[42].output_tokens in (10, 20, 30, 40, 90)


def test_behind_a_queue_longer_than_the_window_answers_are_as_long_as_those_that_end_now() -> None:
    before = [Recorded(400.0 - each, 20, 0, 4, 0.1, 0.02, True) for each in range(40)]
    came_long_ago = [Recorded(100.0 - each, 20, 0, 64, 60.0, 0.02, True) for each in range(40)]
    waiting = [Recorded(50.0 - each, 20, 0, 0, None, None, False) for each in range(40)]
    arrivals = arrivals_in(Window(400, (*before, *came_long_ago, *waiting)), 60)
    assert [arrival.output_tokens for arrival in arrivals] == [64] * len(arrivals)
    assert (len(arrivals), arrivals[-1].at) == (40, 49.0)


def test_what_waits_in_vain_has_missed_the_slo() -> None:
    slo = Slo(ttft=1.0, tpot=0.1)
    met, late = Recorded(9, 10, 0, 5, 0.5, 0.05, True), Recorded(8, 10, 0, 5, 1.5, 0.05, True)
    slow, one = Recorded(7, 10, 0, 5, 0.5, 0.2, True), Recorded(6, 10, 0, 1, 0.5, None, True)
    queued, fresh, writing = (
        Recorded(2, 10, 0, 0, None, None, False), Recorded(0.5, 10, 0, 0, None, None, False), Recorded(3, 10, 0, 4, 0.5, 0.05, False)
    )  # fmt: skip
    assert attained([met, late, slow, one, queued, fresh, writing], slo) == (2, 5)
