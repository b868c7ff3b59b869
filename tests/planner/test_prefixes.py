"""Plans for loads whose prompts begin alike: what is cached takes no time, in the bounds of the search as in the simulation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from diptych.cluster.commands.planning import load_for
from diptych.cluster.load.mix import Mix, Stream
from diptych.cluster.load.slo import Slo
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.goodput import Bench, Terms
from diptych.cluster.planner.search import Planner
from diptych.cluster.planner.shapes import Plan, Sample, Shape
from diptych.cluster.planner.site import Kind, Site, Space
from diptych.core.errors import ConfigError
from worlds import APART, profile

MIX = Mix(streams=(Stream(rate=1, prompt="100", output="4", prefixes=1, prefix_tokens=900),))
SAMPLE = Sample(tuple(islice(MIX.arrivals(1.0), 200)))
SLO = Slo(ttft=0.06, tpot=0.06)
"""A whole prompt takes 116 ms, one with its prefix cached 25."""


def planner(devices: int, *, exhaustive: bool = False) -> Planner:
    known = profile()
    link = known.links["node"]
    site = Site((Kind(known, Space(1, devices), link, link),))
    return Planner(Bench(site, APART, Terms(MIX.arrivals, SLO, most=120, tolerance=0.3)), SAMPLE, exhaustive=exhaustive)


def test_what_is_cached_is_not_reckoned_and_nothing_is_lost_by_a_bound() -> None:
    pruned, every = planner(3).paired(), planner(3, exhaustive=True).paired()
    assert pruned.best is not None
    assert every.best is not None
    assert (pruned.best.plan, pruned.best.rate) == (every.best.plan, every.best.rate)
    assert pruned.best.rate > 1 / 0.1, "so many whole prompts no worker computes"
    for each in every.scored:
        assert each.rate <= planner(3)._bound(each.plan)


def test_answers_that_share_a_prefix_hold_it_once() -> None:
    roomy = planner(2)
    whole = Planner(roomy._bench, Sample(tuple(Arrival(0, 0, 1000, 4) for _ in range(9))))
    plan = Plan(Shape(1, 1), Shape(1, 1), prefills=99)
    assert roomy._bound(plan) > 1.3 * whole._bound(plan), "16 whole prompts fit"


def test_a_trace_is_planned_for_with_its_prefixes_tenants_and_bursts(tmp_path: Path) -> None:
    trace = tmp_path / "W.csv"
    rows = ("5,10,3,a,7,8", "5,20,4,b,0,0", "9,30,5,a,7,8")
    trace.write_text("arrival_s,prompt_tokens,output_tokens,tenant,prefix,prefix_tokens\n" + "\n".join(rows))
    load = load_for(trace, None, 1.0, input="1", output="1")
    first, second, third, again = islice(load(0.25, 0), 4)
    assert [each.at for each in (first, second, third, again)] == [0, 0, 8, 12], "0.5 a second, and so at half the rate twice as long"
    assert first == Arrival(0, 0.0, 10, 3, tenant="a", prefix=7, prefix_tokens=8)
    assert (again.number, again.prompt_tokens, second.tenant) == (3, 10, "b")
    assert next(load(1.0, 1)).prompt_tokens == (10, 20, 30)[7919 % 3], "another seed is another load"
    with pytest.raises(ConfigError, match=r"W\.csv says how its requests come: leave --burstiness out"):
        load_for(trace, None, 0.5, input="1", output="1")
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n5,10,3\n5,10,3\n")
    with pytest.raises(ConfigError, match="all come at one moment"):
        load_for(trace, None, 1.0, input="1", output="1")
