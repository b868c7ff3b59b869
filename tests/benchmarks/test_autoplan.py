"""What the benchmark of autoplan makes of its runs; those themselves need an idle machine."""

from __future__ import annotations

from typing import Any

import pytest
from diptych.benchmarks.autoplan import BEGIN, END, Course, Load, claims, stages
from diptych.cluster.load.answer import Answer, Counting
from diptych.cluster.load.slo import Slo
from diptych.cluster.load.workload import Arrival

SAID = (
    (55.0, "autoplan: prompt 448 → 32: 1 prefill + 2 decode (99%) in place of 2 prefill + 1 decode (9%); looked at once more before …"),
    (60.0, "autoplan: prompt 448 → 32: 1 prefill + 2 decode (99%) in place of 2 prefill + 1 decode (9%)"),
    (70.0, "autoplan: now 1 prefill + 2 decode, after 10.0 s"),
)


RECOVERS = "attainment recovers, for the last 30 requests at least"


def course(late: tuple[float, float], said: tuple[tuple[float, str], ...] = (), error: str | None = None) -> Course:
    """One request a second for 120 s; those that are sent in the time `late` are."""

    def answer(at: int) -> Answer:
        ttft = 2.0 if late[0] <= at < late[1] else 0.1
        failed = error if at == 119 else None
        return Answer(Arrival(at, at, 10, 2), at, 0.0, ttft + 0.1, (ttft, ttft + 0.1), 2, 10, 2, 0, Counting.USAGE, failed)

    decisions: list[dict[str, Any]] = [{"at_s": at, "message": message} for at, message in said]
    return Course([answer(at) for at in range(120)], decisions, Slo(ttft=1.0))


def test_a_flip_that_helps_holds_all_that_is_claimed() -> None:
    turned, control, noisy = course((50, 78), SAID), course((50, 120)), course((0, 5))
    found = stages(40.0, turned, control)
    assert turned.decided == [60.0]
    assert [(each["autoplan"], each["without"]) for each in found.values()] == [
        (1.0, 1.0),
        (pytest.approx(1 / 3), pytest.approx(1 / 3)),
        (0, 0),
        (pytest.approx(42 / 45), 0),
    ]
    assert [(each["from_s"], each["requests"]) for each in found.values()] == [(0, 40), (40, 30), (70, 5), (75, 45)]
    assert all(claims(found, turned, control, noisy).values())
    bins = list(turned.bins())
    assert (bins[0]["requests"], bins[0]["share"], bins[10]["share"], bins[16]["share"]) == (5, 1, 0, 1)
    assert bins[0]["offered_per_s"] == {"prompt_tokens": 10, "output_tokens": 2}


@pytest.mark.parametrize(
    ("turned", "control", "noisy", "untrue"),
    [
        (course((50, 120)), course((50, 120)), course((0, 0)), {"one worker flips, by itself", RECOVERS}),
        (course((50, 95), SAID), course((50, 120)), course((0, 0)), {RECOVERS}),
        (course((50, 70), SAID), course((50, 60)), course((0, 0)), {"and not without the flip"}),
        (course((0, 70), SAID), course((50, 120)), course((0, 0)), {"before the turn the load is served"}),
        (course((50, 70), SAID), course((50, 120)), course((0, 0), SAID, "cut off"), {"bursts change nothing", "no request fails"}),
    ],
)
def test_what_does_not_hold_is_said(turned: Course, control: Course, noisy: Course, untrue: set[str]) -> None:
    held = claims(stages(40.0, turned, control), turned, control, noisy)
    assert {what for what, holds in held.items() if not holds} >= untrue
    assert all(holds for what, holds in held.items() if what not in untrue | {"and not without the flip"})


def test_what_is_sent_is_for_the_right_split_and_too_much_for_the_other() -> None:
    load = Load("1:1", {BEGIN: 2.0, END: 4.0}, END, 0.75)
    assert load.rate == pytest.approx(3.0)
    assert load.tells_apart
    assert not Load("1:1", {BEGIN: 2.0, END: 2.5}, END, 0.75).tells_apart
