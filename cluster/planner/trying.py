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
        """The highest rate that it serves, none above `bound`; or why it does not serve the step `least` for each device."""
        terms = self.bench.terms
        if least is not None and least > terms.below(bound / plan.devices):
            why = f"at most {bound / plan.devices:.3g} requests/s per device, whatever is simulated; another serves more"
            return Lost(str(plan), Loss.DOMINATED, why)
        served = self.bench.goodput(plan.hardware(self.bench.profile), plan.devices, bound, least=least)
        if served.best is not None:
            return Scored(plan, served.best.rate, served.proven, self.cost(plan), served.best)
        if least is None:
            return Lost(str(plan), Loss.SLO, f"at no rate tried do {terms.target:.0%} meet both limits")
        probe = served.probes[least]
        why = f"at {terms.rate(least):.3g} requests/s per device at most {probe.share:.1%} of {probe.total} are within the limits"
        return Lost(str(plan), Loss.DOMINATED, why)

    def alone(self, phase: Phase, shape: Shape, bound: float, longest: int) -> float | None:
        """The highest rate of a worker of one phase, by its own limit: the other phase takes no time. `longest`: of the load's requests."""
        slo, ours = self.bench.terms.slo, hardware(self.bench.profile, phase, shape)
        if phase is Phase.PREFILL:
            other = Hardware(Phase.DECODE, 1, 1, _FREE, ours.kv_tokens)
            prompts = prompts_only(self.bench.terms.arrivals)
            served = self.bench.goodput([ours, other], shape.devices, bound, slo=Slo(ttft=slo.ttft), arrivals=prompts)
        else:
            other = Hardware(Phase.PREFILL, 1, 1, _FREE, max(ours.kv_tokens, 2 * longest))
            served = self.bench.goodput([other, ours], shape.devices, bound, slo=Slo(tpot=slo.tpot))
        return None if served.best is None else served.best.rate

    def meet(self, plan: Plan, rate: float, devices: int, step: tuple[int, int] | None = None) -> tuple[Scored | Lost, int]:
        """The verdict at a target rate: with a worker more, of the phase that is short or by `step`, until it is met or `devices` are used
        up; and how many plans that took."""
        tried = 0
        while plan.devices <= devices:
            tried += 1
            probe = self.bench.probe(plan.hardware(self.bench.profile), rate)
            if self.bench.terms.met(probe):
                proven = rate if probe.verdict is Verdict.MET else None
                return Scored(plan, rate, proven, self.cost(plan), probe), tried
            more = step or self._short(plan, rate)
            plan = Plan(plan.prefill, plan.decode, plan.prefills + more[0], plan.decodes + more[1])
        why = f"{rate:g} requests/s would take {plan.devices} devices or more; there are {devices}"
        return Lost(str(plan), Loss.SLO, why, plan), tried

    def cost(self, plan: Plan) -> float:
        """Per hour."""
        return plan.devices * self.bench.profile.device.cost_per_hour

    def _short(self, plan: Plan, rate: float) -> tuple[int, int]:
        """Which phase misses its own limit more."""
        workers, slo = plan.hardware(self.bench.profile), self.bench.terms.slo
        first = self.bench.probe(workers, rate, slo=Slo(ttft=slo.ttft), whole=True)
        rest = self.bench.probe(workers, rate, slo=Slo(tpot=slo.tpot), whole=True)
        return (1, 0) if first.share < rest.share else (0, 1)
