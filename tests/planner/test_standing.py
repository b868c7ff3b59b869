"""What is said of a run before all of it has ended is what would be said afterwards."""

from __future__ import annotations

import random

from diptych.cluster.load.goodput import Trial, Verdict
from diptych.cluster.planner.standing import Standing
from hypothesis import given, settings
from hypothesis import strategies as st

TRIAL = Trial.growing(0.9, 0.95, 240)


def at_the_end(met: list[bool], believed: int) -> tuple[int, Verdict]:
    """The look at which it is decided, and how, when all have ended."""
    for look in TRIAL.looks:
        verdict = TRIAL.judge(sum(met[:look]), look)
        if verdict is Verdict.MISSED or (verdict is Verdict.MET and look >= min(believed, TRIAL.most)):
            return look, verdict
    return TRIAL.most, Verdict.OPEN


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.6, 1.0), st.integers(0, 300), st.booleans())
def test_the_verdict_is_the_one_of_those_who_wait_for_all(seed: int, share: float, believed: int, whole: bool) -> None:
    draw = random.Random(seed)
    met = [draw.random() < share for _ in range(TRIAL.most + 20)]
    ended = sorted(range(len(met)), key=lambda number: number + 40 * draw.random())
    standing = Standing(TRIAL, believed, whole=whole)
    for number in ended:
        standing.add(number, met[number])
        standing.add(number, met[number])
    look, verdict = at_the_end(met, believed)
    assert standing.done
    probe = standing.probe(1.0)
    assert (probe.total, probe.verdict) == (look, verdict)
    exact = whole or verdict is not Verdict.MISSED
    assert probe.met == sum(met[:look]) if exact else probe.met >= sum(met[:look])


def test_a_hopeless_run_need_not_end() -> None:
    standing = Standing(TRIAL, 240)
    for number in range(20, 30):
        standing.add(number, False)
    assert standing.done
    assert standing.verdict is Verdict.MISSED
    assert standing.probe(1.0).met == 22, "of 30, when eight have missed"
