"""Workers on the cores of one host, in simulation: cores are lent as in production, and each phase slows the other as the profile says."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.agenda import Agenda
from diptych.cluster.planner.latency import StepTimes, Work, step_seconds
from diptych.cluster.planner.life import Life
from diptych.cluster.planner.policies import Policies, workers_of
from diptych.cluster.planner.profile import Cores, Hardware, Link, Overheads, Parallelism, Profile, parse_profile
from diptych.cluster.planner.sharing import Host, scaled
from diptych.cluster.planner.world import World
from diptych.core.config import load_config
from diptych.core.fleet import Phase
from diptych.decode_worker.scheduler import DecodeScheduler
from diptych.worker.patience import LATE_NS, MANY_ROWS, SOON_NS
from worlds import APART, TIMES, profile

SOON, LATE = SOON_NS[Phase.DECODE] / 1e9, LATE_NS / 1e9
BOTH = scaled(TIMES, 0.5)
SHARED = profile(
    parallelisms=(Parallelism(tp=1, times=TIMES, by_cores={1: TIMES, 2: BOTH}, kv_tokens={1: 16000}),),
    cores=Cores(count=2, prefill_beside={1: 1.5}, decode_beside={1: 1.25}),
    links={"shm": Link(bytes_per_s=1e13)},
    overheads=Overheads(request=0.0, message=0.0),
)
APART_HERE = {"prefill": {"workers": 1}, "decode": {"workers": 1}}
TOGETHER_HERE = {"prefill": {"workers": 0}, "decode": {"workers": 1}, "router": {"local_prefill": "always"}}


def shared(config: dict[str, object], known: Profile = SHARED) -> list[Hardware]:
    return workers_of(load_config({"ray": {"enabled": False}, **config}), known)


def served(arrivals: Iterator[Arrival], policies: Policies = APART) -> list[Life]:
    lives: list[Life] = []
    world = World(SHARED, shared(APART_HERE), policies, on_end=lives.append)
    world.run(arrivals)
    world.check()
    return sorted(lives, key=lambda life: life.arrival.number)


def prompt(tokens: int, times: StepTimes) -> float:
    return step_seconds(times, Work(tokens=tokens, pairs=tokens * tokens))


def test_each_worker_has_the_cores_that_up_would_give_it() -> None:
    assert [(each.cores, each.times) for each in shared(APART_HERE)] == [(1, TIMES), (1, TIMES)]
    assert [(each.cores, each.times) for each in shared(TOGETHER_HERE)] == [(2, BOTH)]
    crowded = shared({"prefill": {"workers": 2}, "decode": {"workers": 1}})
    assert [(each.cores, each.roaming) for each in crowded] == [(None, 1)] * 3, "three ranks on two cores roam, and nothing is lent"
    (wide, _) = shared({"prefill": {"workers": 1, "threads": 4}, "decode": {"workers": 1}})
    assert (wide.cores, wide.roaming) == (None, 2), "more threads than cores compute no faster than there are cores"
    assert not any(each.on_host for each in shared(APART_HERE, SHARED.model_copy(update={"cores": None})))
    elsewhere = {"ray": {"enabled": True, "address": "auto"}}
    assert [each.cores for each in shared({**APART_HERE, **elsewhere})] == [None, None]


def test_a_prompt_has_the_idle_core_too_and_an_answer_soon_after() -> None:
    (life,) = served(iter([Arrival(0, 0.0, 100, 101)]))
    assert life.first is not None
    assert life.first == pytest.approx(prompt(100, BOTH))
    now, alone = life.first, life.first + SOON
    for step in range(100):
        now += step_seconds(BOTH if now >= alone else TIMES, Work(rows=1, context=101 + step))
    assert life.last == pytest.approx(now, abs=1e-4)


def test_an_answer_between_whose_tokens_a_prompt_came_has_the_idle_core_after_a_second() -> None:
    life, between = served(iter([Arrival(0, 0.0, 100, 501), Arrival(1, 0.5, 100, 1)]))
    assert life.first is not None
    assert between.first is not None
    assert between.first == pytest.approx(0.5 + prompt(100, scaled(TIMES, 1.5)))
    now = life.first
    for step in range(500):
        alone = life.first + SOON <= now < 0.5 or now >= between.first + LATE
        beside = 0.5 <= now < between.first
        now += step_seconds(scaled(TIMES, 1.25) if beside else BOTH if alone else TIMES, Work(rows=1, context=101 + step))
    assert life.last == pytest.approx(now, abs=1e-4)


def test_many_answers_have_it_soon_all_the_same_and_what_they_have_they_keep() -> None:
    agenda = Agenda()
    host = Host(agenda, SHARED)
    prefill, decode = (host.place(each, lambda: None) for each in shared(APART_HERE))
    decode.begin()
    prefill.begin()
    prefill.end()
    agenda.run(lambda: agenda.now >= SOON)
    assert [decode.times(rows) for rows in (1, MANY_ROWS, 1)] == [TIMES, BOTH, BOTH]
    decode.end()
    decode.begin()
    assert decode.times(1) == TIMES


def test_a_decode_worker_that_only_reads_a_prompt_slows_others_like_many() -> None:
    agenda = Agenda()
    cores = Cores(count=2, prefill_beside={1: 1.5, 6: 1.25}, decode_beside={1: 2.0, 6: 1.75})
    host = Host(agenda, SHARED.model_copy(update={"cores": cores}))
    prefill, decode = (host.place(each, lambda: None) for each in shared(APART_HERE))
    prefill.begin()
    decode.begin()
    assert decode.times(0) == scaled(TIMES, 1.75)
    assert prefill.times(0) == scaled(TIMES, 1.25)
    assert decode.times(1) == scaled(TIMES, 2.0)
    assert prefill.times(0) == scaled(TIMES, 1.5)


def test_each_phase_slows_the_other_from_when_it_begins() -> None:
    """The second prompt comes when the first answer is being written, and is long; the first answer ends within it."""
    first, second = served(iter([Arrival(0, 0.0, 100, 6), Arrival(1, 0.05, 1000, 2)]), Policies(chunk_tokens=2048, most_running=None))
    assert first.first is not None
    assert second.first is not None
    now = first.first
    for step in range(5):
        alone = BOTH if now >= first.first + SOON else TIMES
        now += step_seconds(scaled(TIMES, 1.25) if now >= 0.05 else alone, Work(rows=1, context=101 + step))
    assert first.last == pytest.approx(now, abs=1e-4)
    beside, alone = prompt(1000, scaled(TIMES, 1.5)), prompt(1000, BOTH)
    done = (now - 0.05) / beside
    assert 0 < done < 1, "else the answer does not end within the prompt"
    idle_for_2_ms = 0.002 / prompt(1000, TIMES)
    left = 1 - done - idle_for_2_ms
    assert second.first == pytest.approx(now + 0.002 + left * alone, abs=1e-4)


def test_those_who_roam_share_the_cores_among_those_that_compute() -> None:
    """Three prompts at once for three workers on two cores; when the short one is read, there are cores enough for the others."""
    hardware = shared({"prefill": {"workers": 3}, "decode": {"workers": 1}})
    known = SHARED.model_copy(update={"cores": Cores(count=2)})
    lives: list[Life] = []
    world = World(known, hardware, Policies(chunk_tokens=2048, most_running=None), on_end=lives.append)
    world.run(Arrival(number, 0.0, length, 1) for number, length in enumerate((200, 800, 800)))
    world.check()
    short, *long = sorted(lives, key=lambda life: life.arrival.prompt_tokens)
    assert short.first == pytest.approx(1.5 * prompt(200, TIMES))
    assert [life.first for life in long] == pytest.approx([prompt(800, TIMES) + 0.5 * prompt(200, TIMES)] * 2)


@pytest.mark.parametrize("seed", range(3))
def test_stretches_of_steps_change_nothing_here_either(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw, at, load = random.Random(seed), 0.0, []
    for number in range(80):
        at += draw.expovariate(draw.choice([1.0, 10.0]))
        load.append(Arrival(number, at, draw.randint(20, 600), draw.randint(1, 120)))
    fast = [(life.first, life.second, life.last) for life in served(iter(load))]
    monkeypatch.setattr(DecodeScheduler, "steady", lambda self: 0)
    assert [(life.first, life.second, life.last) for life in served(iter(load))] == fast


def test_times_are_those_of_the_most_cores_measured_that_there_are() -> None:
    known = SHARED.parallelisms[0]
    assert [known.on_cores(count) for count in (1, 2, 3)] == [TIMES, BOTH, BOTH]
    assert Parallelism(tp=1, times=TIMES).on_cores(7) == TIMES
    assert Parallelism(tp=1, times=TIMES, by_cores={4: BOTH}).on_cores(1) == BOTH
    apart = Parallelism(tp=1, times=TIMES, by_cores={1: TIMES}, decode_by_cores={1: BOTH})
    assert [apart.on_cores(1, phase) for phase in Phase] == [TIMES, BOTH]
    assert parse_profile(SHARED.model_dump_json(), "p") == SHARED
