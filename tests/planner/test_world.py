"""The simulated cluster: production's classes, the profile's times."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from diptych.cluster.load.slo import Slo
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.latency import Work, step_seconds
from diptych.cluster.planner.life import Life
from diptych.cluster.planner.profile import Link
from diptych.core.fleet import LocalPrefill
from diptych.decode_worker.scheduler import DecodeScheduler
from worlds import APART, TIMES, evenly, run, workers


def test_one_request_takes_the_times_of_its_steps() -> None:
    _, (life,) = run(iter([Arrival(0, 1.0, 100, 5)]), workers(1, 1), link=Link(bytes_per_s=1e12))
    prefill = step_seconds(TIMES, Work(tokens=100, pairs=100**2))
    assert life.ttft == pytest.approx(0.005 + prefill)
    steps = sum(step_seconds(TIMES, Work(rows=1, context=101 + i)) for i in range(4))
    assert life.tpot is not None
    assert life.tpot * 4 == pytest.approx(steps, abs=0.002), "and the hand-over: some messages and the last layer"
    assert life.gap is not None
    assert life.gap > step_seconds(TIMES, Work(rows=1, context=101))


def test_kv_crosses_slower_links_in_the_time_it_takes_unless_it_crosses_while_it_is_computed() -> None:
    gaps = {}
    for overlap in (False, True):
        _, (life,) = run(iter([Arrival(0, 0.0, 100, 5)]), workers(1, 1), link=Link(bytes_per_s=1e9, overlap=overlap))
        assert life.gap is not None
        gaps[overlap] = life.gap
    copied = 100 * 1e5 / 1e9
    assert gaps[False] - gaps[True] == pytest.approx(copied * 0.9, rel=0.02), "one of ten layers is left when the last is computed"


def arrivals(seed: int, count: int, rate: float) -> list[Arrival]:
    draw, at, made = random.Random(seed), 0.0, []
    for number in range(count):
        at += draw.expovariate(rate)
        made.append(
            Arrival(number, at, draw.randint(1, 900), draw.choice([1, 2, draw.randint(3, 300)]), prefix=draw.randint(0, 2), prefix_tokens=0)
        )
    return [replace(each, prefix_tokens=min(each.prompt_tokens, 64 * each.prefix)) for each in made]


@pytest.mark.parametrize("pp", [(1, 1), (2, 3)])
@pytest.mark.parametrize("local", [LocalPrefill.NEVER, LocalPrefill.AUTO, LocalPrefill.ALWAYS])
def test_a_load_beyond_what_memory_holds_is_served_to_its_end(local: LocalPrefill, pp: tuple[int, int]) -> None:
    """`World.check` in `run`: every request has ended, every block is back."""
    here = [] if local is LocalPrefill.ALWAYS else workers(2, 0, kv=(2000, 2000), pp=pp)
    world, lives = run(iter(arrivals(1, 150, 30.0)), here + workers(0, 2, kv=(0, 3000), pp=pp), replace(APART, local_prefill=local))
    assert len(lives) == 150
    assert world.counters()["diptych_worker_preemptions_total"] > 0, "else memory was never short"
    assert all(life.ttft is not None and life.ttft > 0 for life in lives)


@pytest.mark.parametrize("seed", range(6))
def test_stretches_of_steps_change_nothing_but_the_time_that_simulating_takes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """To the last bit, whatever is short: memory, slots or neither; with one stage or several; prompts read here or there."""
    draw = random.Random(seed)
    load = arrivals(seed, 100, draw.choice([4.0, 20.0]))
    local = draw.choice([LocalPrefill.NEVER, LocalPrefill.AUTO, LocalPrefill.ALWAYS])
    policies = replace(APART, local_prefill=local, decode_running=draw.choice([4, 32]))
    kv, stages = draw.choice([2000, 4000, 16000]), draw.choice([1, 2, 3])
    hardware = workers(1 + seed % 2, 2, kv=(kv, kv), pp=(1, stages))
    made: list[int] = []
    advance = DecodeScheduler.advance

    def counting(self: DecodeScheduler, rounds: int, token_id: int) -> bool:
        made.append(rounds)
        return advance(self, rounds, token_id)

    monkeypatch.setattr(DecodeScheduler, "advance", counting)
    fast, lives = run(iter(load), hardware, policies)
    assert sum(made) > 2 * len(made), "else nothing is made at once"
    monkeypatch.setattr(DecodeScheduler, "steady", lambda self: 0)
    slow, others = run(iter(load), hardware, policies)
    assert [times_of(life) for life in lives] == [times_of(life) for life in others]
    assert fast.as_json() == slow.as_json()


def times_of(life: Life) -> tuple[object, ...]:
    return life.name, life.prefill, life.decode, life.granted, life.first, life.second, life.last, life.refused


def test_many_workers_share_the_load() -> None:
    world, _ = run(evenly(200, 0.01, 200, 20), workers(4, 4))
    for workers_of_phase in (world.prefills, world.decodes):
        steps = [worker.counters()["diptych_worker_steps_total"] for worker in workers_of_phase.values()]
        assert min(steps) > 0.8 * max(steps)


def test_the_summary_says_what_the_requests_say() -> None:
    world, lives = run(evenly(60, 0.05, 300, 20), workers(1, 1), slo=Slo(ttft=0.06, tpot=0.03))
    summary = world.as_json()
    met = sum(life.ttft <= 0.06 and life.tpot <= 0.03 for life in lives if life.ttft and life.tpot)
    assert summary["attainment"]["met"] == met
    ordered = sorted(life.ttft for life in lives if life.ttft)
    assert summary["times"]["ttft"]["p90"] == pytest.approx(ordered[53], rel=0.006)
    assert summary["times"]["itl"]["count"] == pytest.approx(60 * 19, rel=0.06), "all gaps but the hand-over's"
    worker = summary["workers"]["prefill-0"]
    assert 0 < worker["utilisation"] <= 1
    assert len(worker["waiting"]["mean"]) <= 256


def test_what_fits_nowhere_and_what_is_too_much_at_once_is_refused_as_the_router_would() -> None:
    world, lives = run(iter([Arrival(0, 0.0, 1500, 600), Arrival(1, 0.1, 10, 2)]), workers(1, 1, kv=(2000, 1600)))
    assert lives[0].refused is not None
    assert "pool" in lives[0].refused
    assert lives[1].refused is None
    world, lives = run(evenly(10, 0.0), workers(1, 1), replace(APART, most_running=4))
    assert (world.refused, sum(life.refused is None for life in lives)) == (6, 4)


def test_a_cached_prefix_is_not_computed_again() -> None:
    load = [Arrival(number, number * 2.0, 500, 4, prefix=1, prefix_tokens=480) for number in range(3)]
    world, lives = run(iter(load), workers(1, 1))
    assert world.counters()["diptych_worker_cached_tokens_total"] >= 2 * 480
    assert lives[1].ttft < 0.6 * lives[0].ttft


@pytest.mark.nightly  # 4 s of CPU
def test_a_thousand_workers_are_simulated() -> None:
    world, lives = run(evenly(2000, 0.002), workers(400, 600))
    assert len(lives) == 2000
    assert all(life.refused is None for life in lives)
    used = {phase: {getattr(life, phase) for life in lives} for phase in ("prefill", "decode")}
    assert len(used["prefill"]) > 20, "many at once"
    assert len(used["decode"]) > 20
    assert len(world.as_json()["workers"]) == 1000
