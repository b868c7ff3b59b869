"""When the plan is changed: a load that turns flips a worker, once; steady and noisy loads flip none. Scores are real simulations."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from diptych.cluster.autoplan.deciding import Autoplanner, Decision
from diptych.cluster.autoplan.replan import HEADROOM, Score, Split, Terms, candidates, chosen
from diptych.cluster.load.slo import Slo
from diptych.core.workload import Window
from hypothesis import given, settings
from hypothesis import strategies as st
from windows import joined, window

SLO = Slo(ttft=1.0, tpot=0.1)
PROMPTS = {"rate": 4.0, "prompt": 400.0, "output": 10.0}
ANSWERS = {"rate": 4.0, "prompt": 40.0, "output": 200.0}


def share_of(split: Split, decision_load: dict[str, float]) -> float:
    """As if a prefill worker read 800 tokens a second, and a decode worker wrote 500."""
    load = decision_load["rate"]
    need = max(load * decision_load["prompt"] / 800 / split.prefills, load * decision_load["output"] / 500 / split.decodes)
    return min(1.0, 1 / need**2) if need else 1.0


@dataclass
class Steered:
    """A cluster whose load is what `at` says, looked at every 15 seconds."""

    split: Split
    terms: Terms = field(default_factory=Terms)
    now: float = 0.0
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.planner = Autoplanner(SLO, self.terms, least=60, cool_down_s=300)

    def look(self, seen: Window) -> None:
        self.now += 15
        look = self.planner.look(self.now, seen, self.split)
        if look is None:
            return
        figures = look.figures
        load = {"rate": figures.rate.value, "prompt": figures.prompt.value, "output": figures.output.value}
        scores = {}
        for split in candidates(self.split, self.terms):
            fewer = split.workers < self.split.workers
            scores[split] = Score(int(1000 * share_of(split, {**load, "rate": load["rate"] * (HEADROOM if fewer else 1)})), 1000)
        decision = self.planner.judge(self.now, look, scores)
        self.decisions.append(decision)
        if decision.sure:
            self.split = decision.split


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_load_that_turns_flips_a_worker_once(seed: int) -> None:
    steered = Steered(Split(2, 1))
    for turn in range(8):
        steered.look(window(120, 1000 * seed + turn, **PROMPTS))  # type: ignore[arg-type]
    assert steered.split == Split(2, 1)
    before, after = window(120, seed, **PROMPTS), window(600, seed + 1, **ANSWERS)  # type: ignore[arg-type]
    for turn in range(1, 30):
        seconds = min(120.0, 15.0 * turn)
        new = Window(seconds, tuple(each for each in after.requests if each.age <= seconds))
        steered.look(new if seconds == 120 else joined(before, new))
    assert steered.split == Split(1, 2)
    flips = [decision for decision in steered.decisions if decision.sure]
    assert len(flips) == 1
    assert "prompt" in flips[0].look.why


@pytest.mark.parametrize("noise", [{}, {"burstiness": 0.3}, {"rate": 5.0, "spread": 1.2}])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_steady_and_noisy_loads_flip_none(noise: dict[str, float], seed: int) -> None:
    steered = Steered(Split(2, 1))
    for turn in range(40):
        steered.look(window(120, 1000 * seed + turn, **{"rate": 3.0, "prompt": 300.0, "output": 10.0, **noise}))  # type: ignore[arg-type]
    assert steered.split == Split(2, 1)
    assert not any(decision.sure for decision in steered.decisions)


def test_nothing_is_planned_while_it_cools_down() -> None:
    steered = Steered(Split(1, 2))
    load = window(120, 1, **PROMPTS)  # type: ignore[arg-type]
    steered.look(load)
    steered.look(load)
    assert steered.split == Split(2, 1)
    turned = window(120, 2, **ANSWERS)  # type: ignore[arg-type]
    for _ in range(19):
        steered.look(turned)
    assert steered.split == Split(2, 1)
    for _ in range(4):
        steered.look(turned)
    assert steered.split == Split(1, 2)


def test_one_win_is_not_enough() -> None:
    steered = Steered(Split(1, 2))
    steered.look(window(120, 1, **PROMPTS))  # type: ignore[arg-type]
    (first,) = steered.decisions
    assert (first.changes, first.sure) == (True, False)
    assert "looked at once more" in str(first)
    steered.look(window(120, 2, rate=3, prompt=40, output=150))
    assert steered.split == Split(1, 2)


def test_missing_the_slo_is_a_reason_to_look_though_nothing_has_changed() -> None:
    steered = Steered(Split(2, 1))
    fine = {"rate": 3.0, "prompt": 300.0, "output": 10.0}
    steered.look(window(120, 1, **fine))  # type: ignore[arg-type]
    steered.look(window(120, 2, **fine))  # type: ignore[arg-type]
    assert len(steered.decisions) == 1
    slow = window(120, 3, **fine, ttft=2.0)  # type: ignore[arg-type]
    steered.look(slow)
    assert len(steered.decisions) == 1, "it was planned for a moment ago"
    steered.now += 300
    steered.look(slow)
    assert "requests met" in steered.decisions[1].look.why
    steered.look(slow)  # nothing better was found, so not again at once
    assert len(steered.decisions) == 2


def test_a_load_of_few_requests_is_not_judged() -> None:
    steered = Steered(Split(2, 1))
    steered.look(window(120, 1, rate=0.2))
    assert steered.decisions == []


def scores(**shares: float) -> dict[Split, Score]:
    return {Split(int(name[1]), int(name[3])): Score(int(1000 * share), 1000) for name, share in shares.items()}


@pytest.mark.parametrize(
    ("simulated", "split"),
    [
        (scores(p2d1=0.95, p1d2=1.0), "p2d1"),  # what serves well stays
        (scores(p2d1=0.6, p1d2=0.64), "p2d1"),  # below the margin
        (scores(p2d1=0.6, p1d2=0.66), "p1d2"),
        (scores(p2d1=0.6, p1d2=0.95, p2d2=1.0), "p1d2"),  # as many workers do
        (scores(p2d1=0.6, p1d2=0.7, p2d2=0.95, p3d1=0.6), "p2d2"),
        (scores(p2d1=0.6, p1d2=0.62, p2d2=0.63), "p2d1"),
        (scores(p2d1=0.99, p1d1=0.95), "p1d1"),  # under more than the load
        (scores(p2d1=0.99, p1d1=0.89), "p2d1"),
    ],
)
def test_what_is_chosen(simulated: dict[Split, Score], split: str) -> None:
    assert chosen(Split(2, 1), simulated, Terms()) == Split(int(split[1]), int(split[3]))


def test_each_phase_keeps_a_worker_and_numbers_stay_within_their_bounds() -> None:
    assert list(candidates(Split(2, 1), Terms())) == [Split(2, 1), Split(1, 2)]
    assert set(candidates(Split(2, 2), Terms())) == {Split(2, 2), Split(1, 3), Split(3, 1)}
    assert set(candidates(Split(1, 1), Terms(most=3))) == {Split(1, 1), Split(1, 2), Split(2, 1)}
    assert set(candidates(Split(2, 1), Terms(least=2, most=3))) == {Split(2, 1), Split(1, 2), Split(1, 1)}
    assert all(abs(split.prefills - 8) <= 2 for split in candidates(Split(8, 8), Terms(most=32)))


def test_pairs_come_and_go_as_pairs_and_keep_their_roles() -> None:
    terms = Terms(least=2, most=6, paired=True)
    assert list(candidates(Split(2, 2), terms)) == [Split(2, 2), Split(1, 1), Split(3, 3)]
    assert list(candidates(Split(3, 3), terms)) == [Split(3, 3), Split(2, 2)]
    short, plenty = Score(500, 1000), Score(990, 1000)
    assert chosen(Split(2, 2), {Split(2, 2): short, Split(1, 1): short, Split(3, 3): plenty}, terms) == Split(3, 3)
    assert chosen(Split(2, 2), {Split(2, 2): plenty, Split(1, 1): plenty, Split(3, 3): plenty}, terms) == Split(1, 1)
    assert chosen(Split(2, 2), {Split(2, 2): plenty, Split(1, 1): short}, terms) == Split(2, 2)
