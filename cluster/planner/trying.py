"""One plan tried by itself: all that it takes goes in and what came of it comes out, so that several are tried at once, in processes of
their own. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.fleet import Phase
from ..load.goodput import Probe, Verdict
from ..load.slo import Slo
from .goodput import Bench, prompts_only
from .latency import DecodeTimes, PrefillTimes, StepTimes
from .profile import Hardware
from .shapes import Loss, Lost, Plan, Shape, hardware
from .site import Cluster, Site

_FREE = StepTimes(prefill=PrefillTimes(constant=0, token=0, pair=0), decode=DecodeTimes(constant=0, context=0, row=0))


@dataclass(frozen=True, slots=True)
class Scored:
    """A plan and the rate that it serves, by `probe`; `proven`: the highest that was met for sure."""

    plan: Plan
    rate: float
    proven: float | None
    cost_per_hour: float
    probe: Probe

    @property
    def per_device(self) -> float:
        return self.rate / self.plan.devices

    @property
    def per_cost(self) -> float:
        """Requests per second for one unit of cost per hour."""
        return self.rate / self.cost_per_hour


@dataclass(frozen=True, slots=True)
class Trier:
    """What is tried is simulated on `bench`."""

    bench: Bench

    def plan(self, plan: Plan, bound: float, least: int | None) -> Scored | Lost:
        """The highest rate that it serves, none above `bound`; or why it does not serve the step `least` for each device, by its cost."""
        terms, site, units = self.bench.terms, self.bench.site, self.bench.site.units(plan)
        if least is not None and least > terms.below(bound / units):
            why = f"at most {bound / units:.3g} requests/s per {site.unit}, whatever is simulated; another serves more"
            return Lost(str(plan), Loss.DOMINATED, why)
        served = self.bench.goodput(site.cluster(plan), units, bound, least=least)
        if served.best is not None:
            return Scored(plan, served.best.rate, served.proven, site.cost(plan), served.best)
        if least is None:
            return Lost(str(plan), Loss.SLO, f"at no rate tried do {terms.target:.0%} meet both limits")
        probe = served.probes[least]
        why = f"at {terms.rate(least):.3g} requests/s per {site.unit} at most {probe.share:.1%} of {probe.total} are within the limits"
        return Lost(str(plan), Loss.DOMINATED, why)

    def unseen(self, plan: Plan, rate: float) -> Probe:
        """`Bench.unseen` of the plan."""
        return self.bench.unseen(self.bench.site.cluster(plan), rate)

    def alone(self, phase: Phase, shape: Shape, bound: float, longest: int) -> float | None:
        """The highest rate of a worker of one phase, by its own limit: the other phase takes no time. `longest`: of the load's requests."""
        slo, kind = self.bench.terms.slo, self.bench.site.kind(shape)
        ours = hardware(kind.profile, phase, shape)
        if phase is Phase.PREFILL:
            other = Hardware(Phase.DECODE, 1, 1, _FREE, ours.kv_tokens)
            prompts = prompts_only(self.bench.terms.arrivals)
            cluster = Cluster([ours, other], kind.profile, kind.link)
            served = self.bench.goodput(cluster, shape.devices, bound, slo=Slo(ttft=slo.ttft), arrivals=prompts)
        else:
            other = Hardware(Phase.PREFILL, 1, 1, _FREE, max(ours.kv_tokens, 2 * longest))
            cluster = Cluster([other, ours], kind.profile, kind.link)
            served = self.bench.goodput(cluster, shape.devices, bound, slo=Slo(tpot=slo.tpot))
        return None if served.best is None else served.best.rate

    def meet(self, plan: Plan, rate: float, room: Site, step: tuple[int, int] | None = None) -> tuple[Scored | Lost, int]:
        """The verdict at a target rate: with a worker more, of the phase that is short or by `step`, until it is met or `room` has no more
        devices; and how many plans that took."""
        tried = 0
        while room.fits(plan):
            tried += 1
            probe = self.bench.probe(room.cluster(plan), rate)
            if self.bench.terms.met(probe):
                proven = rate if probe.verdict is Verdict.MET else None
                return Scored(plan, rate, proven, room.cost(plan), probe), tried
            more = step or self._short(plan, rate)
            plan = Plan(plan.prefill, plan.decode, plan.prefills + more[0], plan.decodes + more[1])
        why = f"{rate:g} requests/s would take {room.amount(plan)} or more; there are {room}"
        return Lost(str(plan), Loss.SLO, why, plan), tried

    def _short(self, plan: Plan, rate: float) -> tuple[int, int]:
        """Which phase misses its own limit more."""
        cluster, slo = self.bench.site.cluster(plan), self.bench.terms.slo
        first = self.bench.probe(cluster, rate, slo=Slo(ttft=slo.ttft), whole=True)
        rest = self.bench.probe(cluster, rate, slo=Slo(tpot=slo.tpot), whole=True)
        return (1, 0) if first.share < rest.share else (0, 1)
