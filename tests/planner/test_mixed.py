"""Plans whose phases are on different kinds of device: which one is found, what it costs, and what `up` and `simulate` are told of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, product

import pytest
from diptych.cluster.load.slo import Slo
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.goodput import Bench, Terms
from diptych.cluster.planner.latency import DecodeTimes, PrefillTimes, StepTimes
from diptych.cluster.planner.plan_file import config_of
from diptych.cluster.planner.policies import workers_of
from diptych.cluster.planner.profile import DeviceShare, Link, Overheads, Parallelism, Profile
from diptych.cluster.planner.search import Outcome, Planner
from diptych.cluster.planner.shapes import Loss, Plan, Sample, Shape
from diptych.cluster.planner.site import Kind, Site, Space
from diptych.core.config import load_config
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from worlds import APART, profile

ONE, TWO = Space(1, 1), Space(1, 2)
SLO = Slo(ttft=0.3, tpot=0.06)


def load(rate: float, seed: int) -> Iterator[Arrival]:
    draw, at, number = random.Random(seed), 0.0, 0
    while True:
        at += draw.expovariate(rate)
        yield Arrival(number, at, draw.randint(50, 200), draw.randint(3, 8))
        number += 1


SAMPLE = Sample(tuple(islice(load(1.0, 0), 200)))


def device(name: str, prefill: float, decode: float, cost: float = 1.0, **changes: object) -> Profile:
    """Seconds of a token of a prompt, and of a decode step."""
    times = StepTimes(
        prefill=PrefillTimes(constant=0.01, token=prefill, pair=0), decode=DecodeTimes(constant=decode, context=1e-6, row=2e-3), hop=0.001
    )
    values: dict[str, object] = {
        "device": DeviceShare(name=name, memory_bytes=10e9, cost_per_hour=cost),
        "parallelisms": (Parallelism(tp=1, times=times, kv_tokens={1: 16000, 2: 32000}),),
    }
    return profile(**(values | changes))


def site(*known: Profile, space: Space = ONE) -> Site:
    return Site(tuple(Kind(each, space, each.links["node"], each.links["node"], each.device.name) for each in known))


def search(there: Site, *, rate: float | None = None, exhaustive: bool = False) -> Outcome:
    bench = Bench(there, APART, Terms(load, SLO, most=60, tolerance=0.3))
    return Planner(bench, SAMPLE, exhaustive=exhaustive).apart(rate)


COMPUTE, MEMORY = device("compute", 1e-4, 0.04), device("memory", 4e-4, 0.02)


@pytest.fixture(scope="module")
def found() -> Outcome:
    return search(site(COMPUTE, MEMORY))


def test_each_phase_is_on_the_device_that_suits_it(found: Outcome) -> None:
    assert found.best is not None
    assert found.best.plan == Plan(Shape(1, 1, "compute"), Shape(1, 1, "memory"))
    assert str(found.best.plan) == "1 × prefill (tp 1 pp 1 on compute) + 1 × decode (tp 1 pp 1 on memory)"
    assert found.considered == 4


def test_what_is_not_simulated_could_not_have_won(found: Outcome) -> None:
    every = search(site(COMPUTE, MEMORY), exhaustive=True)
    assert found.best is not None
    assert every.best is not None
    assert (found.best.plan, found.best.rate) == (every.best.plan, every.best.rate)
    assert every.simulated >= found.simulated


@pytest.mark.nightly
def test_what_a_device_costs_decides() -> None:
    """The better one serves too little more for forty times the price."""
    best = search(site(device("compute", 1e-4, 0.04, cost=40.0), MEMORY, space=TWO)).best
    assert best is not None
    assert best.plan.kinds == ("memory", "memory")
    assert best.cost_per_hour == best.plan.devices


@pytest.mark.nightly
@pytest.mark.timeout(900)  # one took 80 s beside twenty others on two cores
@pytest.mark.parametrize("costs", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.5)])
def test_nor_on_more_devices_whatever_they_cost(costs: tuple[float, float]) -> None:
    there = site(device("a", 1e-4, 0.03, costs[0]), device("b", 3e-4, 0.02, costs[1]), space=Space(1, 3))
    pruned, every = (search(there, exhaustive=exhaustive) for exhaustive in (False, True))
    assert pruned.best is not None
    assert every.best is not None
    assert (pruned.best.plan, pruned.best.rate) == (every.best.plan, every.best.rate)
    assert pruned.simulated < every.simulated


def test_a_rate_that_one_kind_cannot_serve_takes_devices_of_both() -> None:
    outcome = search(site(COMPUTE, MEMORY), rate=1000.0)
    assert outcome.best is None
    (lost,) = {each.why for each in outcome.lost if each.plan is not None and each.plan.kinds == ("compute", "memory")}
    assert lost.endswith("× memory or more; there are 1 × compute and 1 × memory")
    assert all(each.loss is not Loss.NO_PROFILE for each in outcome.lost)


def test_devices_are_counted_by_kind_and_by_what_they_cost() -> None:
    there = site(device("a", 1e-4, 0.02, cost=3.0), device("b", 1e-4, 0.02, cost=1.5), space=Space(1, 4))
    mixed = Plan(Shape(1, 2, "a"), Shape(1, 1, "b"), 2, 4)
    assert there.fits(mixed)
    assert (there.cost(mixed), there.units(mixed), there.unit) == (18.0, 12.0, "cost of one b")
    assert there.amount(mixed) == "4 × a and 4 × b"
    assert not there.fits(Plan(Shape(1, 2, "a"), Shape(1, 1, "a"), 2, 1)), "all are taken"
    assert not there.fits(Plan(Shape(1, 1, "a"), Shape(1, 1, "b"), 5, 1))
    assert there.multiplied(2).fits(Plan(Shape(1, 1, "a"), Shape(1, 1, "b"), 5, 1))


def test_kv_between_kinds_takes_the_slower_link_and_messages_the_slower_way() -> None:
    quick, slow = Link(bytes_per_s=1e10), Link(bytes_per_s=1e9, latency=1e-3, overlap=False)
    ours, theirs = device("a", 1e-4, 0.02), device("b", 1e-4, 0.02, overheads=Overheads(request=0.02, message=0.0))
    there = Site((Kind(ours, Space(1, 1), quick, quick, "a"), Kind(theirs, Space(1, 1), quick, slow, "b")))
    for (prefill, decode), link in zip(product("ab", "ab"), (quick, slow, slow, quick), strict=True):
        cluster = there.cluster(Plan(Shape(1, 1, prefill), Shape(1, 1, decode)))
        assert cluster.link == link
        assert cluster.profile.overheads.request == (0.005 if prefill == decode == "a" else 0.02)
        assert [each.times for each in cluster.hardware] == [{"a": ours, "b": theirs}[on].parallelisms[0].times for on in (prefill, decode)]


def test_the_plan_says_which_device_and_is_simulated_on_it() -> None:
    plan = Plan(Shape(1, 1, "compute"), Shape(1, 2, "memory"), 2, 1)
    config = load_config(config_of(plan, COMPUTE, APART, None, MEMORY))
    assert (config.device, config.prefill.accelerator, config.decode.accelerator) == ("cuda", "compute", "memory")
    workers = workers_of(config, COMPUTE, [MEMORY])
    assert [(each.phase, each.times) for each in workers] == [
        (Phase.PREFILL, COMPUTE.parallelisms[0].times),
        (Phase.PREFILL, COMPUTE.parallelisms[0].times),
        (Phase.DECODE, MEMORY.parallelisms[0].times),
    ]
    with pytest.raises(ConfigError, match=r"^decode\.accelerator: there is no profile of memory"):
        workers_of(config, COMPUTE)
    with pytest.raises(ConfigError, match=r"^prefill\.accelerator: the profiles are of compute, memory; name one"):
        workers_of(load_config({}), COMPUTE, [MEMORY])
