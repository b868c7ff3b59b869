"""The highest rate that a plan serves within the SLO, by simulation: bracket, bisect, and let each run grow until it is sure. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from ..load.goodput import Probe, Trial, Verdict
from ..load.slo import Slo
from ..load.workload import Arrival
from .life import Life
from .policies import Policies
from .site import Cluster, Site
from .standing import Standing
from .world import World

FLOOR = 1 / 64
"""Requests per second; a cluster that does not serve as much serves nothing."""
FILLINGS = 15
"""A queue that grows by a fifteenth of what comes has, by then, doubled what is in the cluster. With 5 a plan of OPT-13B was sure of 95 %
at a rate at which 28 to 38 % of 3,000 requests attain: a decode worker's memory fills over minutes."""
Arrivals = Callable[[float, int], Iterator[Arrival]]
"""The load at a rate, by seed; endless. It can be sent to another process."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked of a plan: the load, the limits, which share must meet them, how sure that has to be, the most requests of one run."""

    arrivals: Arrivals
    slo: Slo
    target: float = 0.9
    confidence: float = 0.95
    most: int = 1920
    tolerance: float = 0.05
    seed: int = 0

    def rate(self, step: int) -> float:
        """Requests per second and device, or what costs as much as the cheapest. All plans are tried at the same ones, each `tolerance`
        above the one before."""
        return float((1 + self.tolerance) ** step)

    def below(self, per_unit: float) -> int:
        """The step of the highest of them that is not above this."""
        return math.floor(math.log(per_unit) / math.log(1 + self.tolerance) + 1e-6)

    @property
    def halving(self) -> int:
        """As many steps as halve a rate."""
        return round(math.log(2) / math.log(1 + self.tolerance))

    @property
    def trial(self) -> Trial:
        return Trial.growing(self.target, self.confidence, self.most)

    def met(self, probe: Probe) -> bool:
        """By its verdict; by its share where that is open."""
        return probe.verdict is Verdict.MET or (probe.verdict is Verdict.OPEN and probe.share >= self.target)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where plans are tried."""

    site: Site
    policies: Policies
    terms: Terms

    def probe(
        self,
        cluster: Cluster,
        rate: float,
        *,
        slo: Slo | None = None,
        arrivals: Arrivals | None = None,
        whole: bool = False,
        trial: Trial | None = None,
    ) -> Probe:
        """Simulate one rate until its attainment is surely above or below the target. Requests that come while the cluster fills,
        within the time that one may take, are not counted; and that it is met is not believed before `FILLINGS` times as many.
        `whole`: not without those that can change nothing any more."""
        terms, limits = self.terms, slo or self.terms.slo
        ahead, load = _filling((arrivals or terms.arrivals)(rate, terms.seed), limits)
        standing = Standing(trial or terms.trial, FILLINGS * ahead, whole=whole)

        def known(life: Life) -> None:
            if life.arrival.number >= ahead:
                standing.add(life.arrival.number - ahead, world.meets(life))

        world = World(cluster.profile, cluster.hardware, self.policies, link=cluster.link, slo=limits, on_late=known, on_end=known)
        world.run(islice(load, ahead + terms.most), lambda: standing.done)
        return standing.probe(rate)

    def unseen(self, cluster: Cluster, rate: float) -> Probe:
        """One rate with a draw of the load that no search has seen, as many requests as a run may have unless it is hopeless."""
        terms = self.terms
        fresh = replace(self, terms=replace(terms, seed=terms.seed + 1))
        return fresh.probe(cluster, rate, trial=Trial(terms.target, terms.confidence, (terms.most,)))

    def goodput(
        self,
        cluster: Cluster,
        units: float,
        bound: float,
        *,
        least: int | None = None,
        slo: Slo | None = None,
        arrivals: Arrivals | None = None,
    ) -> Served:
        """The highest of the rates (`Terms.rate`) of so many devices that is served, none above `bound`. `units`: devices, each counted by
        its cost. `least`: a step that others reach; if this does not, it does not matter what it reaches."""
        terms = self.terms
        served = Served(terms, units, terms.below(bound / units), least)
        step: int | None = served.top - terms.halving if least is None else least
        while step is not None:
            served.probes[step] = self.probe(cluster, terms.rate(step) * units, slo=slo, arrivals=arrivals)
            step = served.following()
        return served


@dataclass(slots=True)
class Served:
    """A search among the rates of so many devices, up to the step `top`: by bisection, or up from `least` in growing strides. What was met
    or missed counts for all that is below or above it, so no rate is tried twice."""

    terms: Terms
    units: float
    top: int
    least: int | None
    probes: dict[int, Probe] = field(default_factory=dict)

    @property
    def missed(self) -> int:
        """The lowest step that is not served, as far as was tried."""
        return min((step for step, probe in self.probes.items() if not self.terms.met(probe)), default=self.top + 1)

    @property
    def step(self) -> int | None:
        """The highest below it that is."""
        return max((step for step, probe in self.probes.items() if step < self.missed), default=None)

    def following(self) -> int | None:
        """What to try next; None when there is no more to find."""
        stride, missed = 1 << (len(self.probes) - 1), self.missed
        if (good := self.step) is None:
            lower = missed - 4 * stride
            return lower if self.least is None and self.terms.rate(lower) * self.units >= FLOOR else None
        if missed - good <= 1:
            return None
        middle = (good + missed) // 2
        return middle if self.least is None else min(good + stride, middle)

    @property
    def best(self) -> Probe | None:
        """At the highest rate served."""
        return None if self.step is None else self.probes[self.step]

    @property
    def proven(self) -> float | None:
        """The highest rate below those missed that was met at the confidence of a probe."""
        rates = [probe.rate for step, probe in self.probes.items() if step < self.missed and probe.verdict is Verdict.MET]
        return max(rates, default=None)


def _filling(load: Iterator[Arrival], slo: Slo) -> tuple[int, Iterator[Arrival]]:
    """How many requests come while a cluster fills, which is as long as one of mean length may take; and all of them again."""
    early: list[Arrival] = []
    tokens = 0
    for arrival in load:
        early.append(arrival)
        tokens += arrival.output_tokens
        if arrival.at >= (slo.ttft or 1.0) + (slo.tpot or 0.05) * tokens / len(early):
            break
    return len(early) - 1, _again(early, load)


def _again(early: list[Arrival], load: Iterator[Arrival]) -> Iterator[Arrival]:
    yield from early
    yield from load


def prompts_only(arrivals: Arrivals) -> Arrivals:
    """The same prompts, each with one token of output: what prefill workers alone can be tried with."""
    return partial(_prompts_only, arrivals)


def _prompts_only(arrivals: Arrivals, rate: float, seed: int) -> Iterator[Arrival]:
    return (replace(arrival, output_tokens=1) for arrival in arrivals(rate, seed))
