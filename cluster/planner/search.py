"""Which plan serves most requests within the SLO for each device. Pure.

`paired` is DistServe's Algorithm 2, for nodes with slow links between them: a prefill and a decode worker share each node, so that KV stays
on it; every pair of shapes that fits is tried together. `apart` is its Algorithm 1: each phase is tried by itself, the best few of
both are combined, in the numbers that balance them, and simulated together. What cannot win is not
searched, with the same answer: neither a plan whose upper bound is below the best found, nor one that misses the SLO at the rate with
which it would win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from ...core.fleet import Phase
from ..load.goodput import Probe, Verdict
from ..load.slo import Slo
from .goodput import Bench, prompts_only
from .latency import DecodeTimes, PrefillTimes, StepTimes
from .profile import Hardware, Profile
from .shapes import Loss, Lost, Plan, Sample, Shape, hardware, idle_seconds, lacking, most_answers, most_prompts

CONTENDERS = 3
"""Shapes of each phase that are tried together, where phases are searched apart."""
_FREE = StepTimes(prefill=PrefillTimes(constant=0, token=0, pair=0), decode=DecodeTimes(constant=0, context=0, row=0))


@dataclass(frozen=True, slots=True)
class Space:
    """The devices there are."""

    nodes: int
    per_node: int

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    def shapes(self, profile: Profile, most: int) -> list[Shape]:
        """Of at most `most` devices, the shards of a stage on one node."""
        tps = [tp for tp in range(1, min(self.per_node, most) + 1) if profile.model.heads % tp == 0]
        return [Shape(tp, pp) for tp in tps for pp in range(1, min(profile.model.layers, most // tp) + 1)]


@dataclass(frozen=True, slots=True)
class Scored:
    """A plan and the rate that it serves; `probe` is the one at that rate, if it was tried there."""

    plan: Plan
    rate: float
    proven: float | None
    cost_per_hour: float
    probe: Probe | None = None

    @property
    def per_device(self) -> float:
        return self.rate / self.plan.devices

    @property
    def per_cost(self) -> float:
        """Requests per second for one unit of cost per hour."""
        return self.rate / self.cost_per_hour


@dataclass(slots=True)
class Outcome:
    """`scored`: best first. `simulated`: how many plans were; `considered`: how many there are."""

    scored: list[Scored] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    considered: int = 0
    simulated: int = 0

    @property
    def best(self) -> Scored | None:
        return self.scored[0] if self.scored else None

    def sort(self, tolerance: float) -> Outcome:
        """By rate for its cost; first the smallest of those that serve equally much, as far as rates are known."""
        self.scored.sort(key=lambda each: (-each.per_cost, each.plan.devices))
        if self.scored:
            equal = [each for each in self.scored if each.per_cost >= self.scored[0].per_cost * (1 - tolerance)]
            smallest = min(equal, key=lambda each: each.plan.devices)
            self.scored.remove(smallest)
            self.scored.insert(0, smallest)
        return self

    def front(self) -> list[Scored]:
        """Those that no other serves more than at no more cost, the cheapest first."""
        made: list[Scored] = []
        for each in sorted(self.scored, key=lambda each: (each.cost_per_hour, -each.rate)):
            if not made or each.rate > made[-1].rate:
                made.append(each)
        return made


Shown = Callable[[str], None]


class Planner:
    """`shown` is told what is tried. `exhaustive`: simulate also what cannot win."""

    def __init__(self, bench: Bench, space: Space, sample: Sample, *, exhaustive: bool = False, shown: Shown = lambda what: None) -> None:
        self._bench, self._space, self._sample = bench, space, sample
        self._profile, self._slo, self._target = bench.profile, bench.terms.slo, bench.terms.target
        self._exhaustive, self._shown = exhaustive, shown

    def paired(self, rate: float | None = None) -> Outcome:
        """Algorithm 2. With a target `rate` each pair is taken as often as that needs."""
        outcome = Outcome()
        allowed = self._allowed(self._space.devices, outcome)
        pairs = list(self._pairs(allowed))
        outcome.considered = len(pairs)
        self._try(pairs, outcome)
        return self._multiplied(outcome, rate) if rate is not None else outcome

    def apart(self, rate: float | None = None) -> Outcome:
        """Algorithm 1. Without a target `rate`: the numbers that balance the phases best on the devices there are."""
        outcome = Outcome()
        allowed = self._allowed(self._space.devices, outcome)
        sides = {phase: self._contenders(phase, shapes, outcome) for phase, shapes in allowed.items()}
        plans = [
            plan
            for (prefill, prompts), (decode, answers) in product(sides[Phase.PREFILL], sides[Phase.DECODE])
            if (plan := self._balanced(prefill, prompts, decode, answers, rate)) is not None
        ]
        outcome.considered = len(allowed[Phase.PREFILL]) * len(allowed[Phase.DECODE])
        if rate is None:
            self._try(plans, outcome)
            return outcome
        for plan in plans:
            self._meet(plan, rate, outcome)
        return outcome.sort(self._bench.terms.tolerance)

    # -- what there is to try ------------------------------------------------------------------------------------------

    def _allowed(self, most: int, outcome: Outcome) -> dict[Phase, list[Shape]]:
        """Shapes of each phase that can serve at all; of the others why not."""
        allowed: dict[Phase, list[Shape]] = {}
        for phase in Phase:
            allowed[phase] = []
            for shape in self._space.shapes(self._profile, most - 1):
                lost = lacking(self._profile, phase, shape, self._sample, self._slo, self._target)
                if lost is None:
                    allowed[phase].append(shape)
                else:
                    outcome.lost.append(lost)
        return allowed

    def _pairs(self, allowed: dict[Phase, list[Shape]]) -> Iterator[Plan]:
        """A part of each phase on every node that the pair spans."""
        for prefill, decode in product(allowed[Phase.PREFILL], allowed[Phase.DECODE]):
            spans = [
                span
                for span in range(1, self._space.nodes + 1)
                if prefill.pp % span == 0 and decode.pp % span == 0
                and (prefill.devices + decode.devices) // span <= self._space.per_node
            ]  # fmt: skip
            if spans:
                yield Plan(prefill, decode)

    def _bound(self, plan: Plan) -> float:
        """No rate above this is served for long, and at most 1 / target of it meets the SLO for a while."""
        policies = self._bench.policies
        prompts = plan.prefills * most_prompts(self._profile, plan.prefill, self._sample, policies)
        answers = plan.decodes * most_answers(self._profile, plan.decode, self._sample, self._slo, policies)
        return min(prompts, answers) / self._target

    def _cost(self, plan: Plan) -> float:
        return plan.devices * self._profile.device.cost_per_hour

    # -- trying --------------------------------------------------------------------------------------------------------

    def _try(self, plans: Iterable[Plan], outcome: Outcome) -> None:
        """Simulate, the most promising first, as long as one can still win."""
        best = 0.0
        bounds = {plan: self._bound(plan) for plan in plans}
        for plan in sorted(bounds, key=lambda plan: -self._promise(plan)):
            self._shown(str(plan))
            if not self._exhaustive and (why := self._beaten(plan, bounds[plan], best)) is not None:
                outcome.lost.append(Lost(str(plan), Loss.DOMINATED, why))
                continue
            outcome.simulated += 1
            scored = self._score(plan, bounds[plan])
            if scored is None:
                outcome.lost.append(Lost(str(plan), Loss.SLO, f"at no rate tried do {self._target:.0%} meet both limits"))
                continue
            outcome.scored.append(scored)
            best = max(best, scored.per_device)
        outcome.sort(self._bench.terms.tolerance)

    def _promise(self, plan: Plan) -> float:
        """By which plans are ordered: the bound per device, less what of the TTFT limit a prompt takes alone. The sooner a good plan is
        found, the more of the others are beaten at once."""
        policies, slo = self._bench.policies, self._slo
        prompts = most_prompts(self._profile, plan.prefill, self._sample, policies)
        if slo.ttft is not None:
            prompts *= max(0.0, 1 - idle_seconds(self._profile, Phase.PREFILL, plan.prefill, self._sample, self._target) / slo.ttft)
        answers = most_answers(self._profile, plan.decode, self._sample, slo, policies)
        return min(plan.prefills * prompts, plan.decodes * answers) / plan.devices

    def _beaten(self, plan: Plan, bound: float, best: float) -> str | None:
        """Why the plan serves less per device than `best`, by more than rates are known; None if it might not."""
        enough = best * (1 - self._bench.terms.tolerance)
        if bound / plan.devices <= enough:
            return f"at most {bound / plan.devices:.3g} requests/s per device, whatever is simulated; the best serves {best:.3g}"
        if best == 0.0:
            return None
        probe = self._bench.probe(plan.hardware(self._profile), enough * plan.devices)
        if probe.verdict is Verdict.MISSED or (probe.verdict is Verdict.OPEN and probe.share < self._target):
            return f"at {enough:.3g} requests/s per device {probe.share:.1%} are within the limits ({probe.total} simulated)"
        return None

    def _score(self, plan: Plan, bound: float) -> Scored | None:
        search = self._bench.goodput(plan.hardware(self._profile), bound / 2)
        found = search.found()
        if found.rate is None:
            return None
        probe = next(probe for probe in search.probes if probe.rate == found.rate)
        return Scored(plan, found.rate, found.proven, self._cost(plan), probe)

    def _contenders(self, phase: Phase, shapes: Sequence[Shape], outcome: Outcome) -> list[tuple[Shape, float]]:
        """The best shapes of a phase by its rate per device, alone: the other phase takes no time."""
        found: list[tuple[Shape, float]] = []
        bounds = {shape: self._alone_bound(phase, shape) for shape in shapes}
        for shape in sorted(bounds, key=lambda shape: -bounds[shape] / shape.devices):
            most, worst = bounds[shape] / shape.devices, found[CONTENDERS - 1] if len(found) >= CONTENDERS else None
            if worst is not None and most <= worst[1] / worst[0].devices and not self._exhaustive:
                why = f"at most {most:.3g} requests/s per device; {CONTENDERS} shapes serve more"
                outcome.lost.append(Lost(f"{phase.value} {shape}", Loss.DOMINATED, why))
                continue
            self._shown(f"{phase.value} {shape}")
            if (rate := self._alone(phase, shape, bounds[shape])) is None:
                outcome.lost.append(Lost(f"{phase.value} {shape}", Loss.SLO, f"at no rate tried do {self._target:.0%} meet the limit"))
                continue
            found.append((shape, rate))
            found.sort(key=lambda each: -each[1] / each[0].devices)
        for shape, rate in found[CONTENDERS:]:
            outcome.lost.append(Lost(f"{phase.value} {shape}", Loss.DOMINATED, f"{rate / shape.devices:.3g} requests/s per device"))
        return found[:CONTENDERS]

    def _alone_bound(self, phase: Phase, shape: Shape) -> float:
        policies = self._bench.policies
        if phase is Phase.PREFILL:
            return most_prompts(self._profile, shape, self._sample, policies) / self._target
        return most_answers(self._profile, shape, self._sample, self._slo, policies) / self._target

    def _alone(self, phase: Phase, shape: Shape, bound: float) -> float | None:
        ours = hardware(self._profile, phase, shape)
        if phase is Phase.PREFILL:
            limits = Slo(ttft=self._slo.ttft)
            other = Hardware(Phase.DECODE, 1, 1, _FREE, ours.kv_tokens)
            search = self._bench.goodput([ours, other], bound / 2, slo=limits, arrivals=prompts_only(self._bench.terms.arrivals))
        else:
            other = Hardware(Phase.PREFILL, 1, 1, _FREE, max(ours.kv_tokens, 2 * self._sample.longest))
            search = self._bench.goodput([other, ours], bound / 2, slo=Slo(tpot=self._slo.tpot))
        return search.found().rate

    def _balanced(self, prefill: Shape, prompts: float, decode: Shape, answers: float, rate: float | None) -> Plan | None:
        """So many workers of each that both phases serve `rate`, or as nearly equal rates as the devices allow."""
        if rate is not None:
            plan = Plan(prefill, decode, max(1, math.ceil(rate / prompts)), max(1, math.ceil(rate / answers)))
            return plan if plan.devices <= self._space.devices else None
        room = self._space.devices
        counts = [
            Plan(prefill, decode, n, m)
            for n in range(1, room // prefill.devices + 1)
            for m in range(1, (room - n * prefill.devices) // decode.devices + 1)
        ]
        return max(
            counts, key=lambda plan: (min(plan.prefills * prompts, plan.decodes * answers) / plan.devices, -plan.devices), default=None
        )

    # -- a target rate -------------------------------------------------------------------------------------------------

    def _multiplied(self, outcome: Outcome, rate: float) -> Outcome:
        """Each pair as often as the target rate needs, and simulated so."""
        units, outcome.scored = outcome.scored, []
        for unit in units[: 2 * CONTENDERS]:
            count = max(1, math.ceil(rate / unit.rate))
            self._meet(Plan(unit.plan.prefill, unit.plan.decode, count, count), rate, outcome, step=(1, 1))
        return outcome.sort(self._bench.terms.tolerance)

    def _meet(self, plan: Plan, rate: float, outcome: Outcome, step: tuple[int, int] | None = None) -> None:
        """The verdict at the target rate: with a worker more, of the phase that is short or by `step`, until it is met."""
        while plan.devices <= self._space.devices:
            self._shown(f"{plan} at {rate:g}/s")
            outcome.simulated += 1
            probe = self._bench.probe(plan.hardware(self._profile), rate)
            if probe.verdict is Verdict.MET or (probe.verdict is Verdict.OPEN and probe.share >= self._target):
                proven = rate if probe.verdict is Verdict.MET else None
                outcome.scored.append(Scored(plan, rate, proven, self._cost(plan), probe))
                return
            more = step or self._short(plan, rate)
            plan = Plan(plan.prefill, plan.decode, plan.prefills + more[0], plan.decodes + more[1])
        why = f"{rate:g} requests/s would take {plan.devices} devices; there are {self._space.devices}"
        outcome.lost.append(Lost(str(plan), Loss.SLO, why))

    def _short(self, plan: Plan, rate: float) -> tuple[int, int]:
        """Which phase misses its own limit more."""
        workers = plan.hardware(self._profile)
        first = self._bench.probe(workers, rate, slo=Slo(ttft=self._slo.ttft))
        rest = self._bench.probe(workers, rate, slo=Slo(tpot=self._slo.tpot))
        return (1, 0) if first.share < rest.share else (0, 1)
