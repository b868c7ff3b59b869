"""The highest rate that a plan serves within the SLO, by simulation: bracket, bisect, and let each run grow until it is sure. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ..load.goodput import Probe, Search, Tally, Trial, Verdict
from ..load.slo import Slo
from ..load.workload import Arrival
from .life import Life
from .policies import Policies
from .profile import Hardware, Link, Profile
from .world import World

FILLINGS = 5
"""A queue that grows by a fifth of what comes has, by then, doubled what is in the cluster."""
Arrivals = Callable[[float, int], Iterator[Arrival]]
"""The load at a rate, by seed; endless."""


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


@dataclass(frozen=True, slots=True)
class Bench:
    """Where plans are tried."""

    profile: Profile
    policies: Policies
    link: Link
    terms: Terms

    def probe(self, hardware: Sequence[Hardware], rate: float, *, slo: Slo | None = None, arrivals: Arrivals | None = None) -> Probe:
        """Simulate one rate until its attainment is surely above or below the target. Requests that come while the cluster fills,
        within the time that one may take, are not counted; and that it is met is not believed before `FILLINGS` times as many."""
        terms = self.terms
        trial, tally = Trial.growing(terms.target, terms.confidence, terms.most), Tally()
        looks, verdict = iter(trial.looks), Verdict.OPEN
        look = next(looks)
        limits = slo or terms.slo
        load = (arrivals or terms.arrivals)(rate, terms.seed)
        ahead, load = _filling(load, limits)
        done = False

        def ended(life: Life) -> None:
            nonlocal look, verdict, done
            if life.arrival.number < ahead:
                return
            tally.add(life.arrival.number - ahead, world.meets(life))
            while not done and tally.advance(look):
                verdict = trial.judge(tally.met, tally.total)
                if verdict is Verdict.MET and look < min(trial.most, FILLINGS * ahead):
                    verdict = Verdict.OPEN
                done = verdict is not Verdict.OPEN or look == trial.most
                look = next(looks, look)

        world = World(self.profile, hardware, self.policies, link=self.link, slo=limits, on_end=ended)
        world.run(islice(load, ahead + terms.most), lambda: done)
        low, high = trial.interval(tally.met, tally.total)
        return Probe(rate, tally.met, tally.total, low, high, verdict)

    def goodput(self, hardware: Sequence[Hardware], start: float, *, slo: Slo | None = None, arrivals: Arrivals | None = None) -> Search:
        """Search for the highest rate; `start`: the first that is tried."""
        search = Search(self.terms.target, start, self.terms.tolerance)
        while (rate := search.next_rate()) is not None:
            search.add(self.probe(hardware, rate, slo=slo, arrivals=arrivals))
        return search


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

    def made(rate: float, seed: int) -> Iterator[Arrival]:
        return (replace(arrival, output_tokens=1) for arrival in arrivals(rate, seed))

    return made
