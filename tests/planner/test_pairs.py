"""Pairs in simulation: the router's own policy keeps KV within them, and a plan's file says that they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.plan_file import config_of
from diptych.cluster.planner.policies import Policies, workers_of
from diptych.cluster.planner.shapes import Plan, Shape
from diptych.core.config import load_config
from worlds import APART, profile, run, workers

PAIRED = replace(APART, paired=True)


def load(count: int, rate: float) -> Iterator[Arrival]:
    draw, at = random.Random(3), 0.0
    for number in range(count):
        at += draw.expovariate(rate)
        yield Arrival(number, at, draw.randint(50, 900), draw.randint(2, 200))


def test_kv_stays_within_pairs_and_would_not_otherwise() -> None:
    for policies, within in ((PAIRED, True), (APART, False)):
        world, lives = run(load(150, 8.0), workers(3, 3), policies)
        numbers = {(str(life.prefill)[-1], str(life.decode)[-1]) for life in lives}
        assert (numbers == {("0", "0"), ("1", "1"), ("2", "2")}) == within
        assert world.across == {}


def test_kv_that_leaves_its_pair_is_counted_by_why() -> None:
    world, lives = run(load(60, 8.0), workers(2, 1), PAIRED)
    assert world.across["gone"] == sum(life.prefill == "prefill-1" for life in lives)
    world, _ = run(load(120, 30.0), workers(2, 2, kv=(16000, 2000)), PAIRED)
    assert world.as_json()["across"]["full"] > 0


def test_a_plan_of_pairs_is_a_config_of_pairs_and_is_simulated_as_one() -> None:
    known = profile()
    for paired in (True, False):
        values = config_of(Plan(Shape(1, 1), Shape(1, 1), 3, 3), known, replace(APART, paired=paired), None)
        config = load_config(values)
        assert config.paired is Policies.of(config).paired is paired
        assert len(workers_of(config, known)) == 6
