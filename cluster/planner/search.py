"""Which plan serves most requests within the SLO for each device. Pure.

`paired` is DistServe's Algorithm 2, for nodes with slow links between them: a prefill and a decode worker share each node, so that KV stays
on it; every pair of shapes that fits is tried together. `apart` is its Algorithm 1: each phase is tried by itself, the best few of
both are combined, in the numbers that balance them, and simulated together. What cannot win is not
searched, with the same answer: neither a plan whose upper bound is below the best found, nor one that misses the SLO at the rate with
which it would win.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import product
from typing import ParamSpec, TypeVar

from ...core.fleet import Phase
from ..load.goodput import Probe
from ..load.slo import Slo
from .goodput import Bench
from .shapes import Loss, Lost, Plan, Sample, Shape, idle_seconds, lacking, most_answers, most_prompts
from .trying import Scored, Trier

CONTENDERS = 3
"""Shapes of each phase on each kind of device that are tried together, where phases are searched apart."""
AT_ONCE = 2
"""Plans that are tried at once, if there are cores for them: each knows what came of those before it, but for the last one, and with more
at once more would be searched to their end. It is a constant so that the same is simulated, and found, on every machine."""
P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


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

    def note(self, found: Scored | Lost) -> None:
        if isinstance(found, Scored):
            self.scored.append(found)
        else:
            self.lost.append(found)

    def sort(self) -> Outcome:
        """By rate for its cost; the cheapest, and the smallest, first of those that serve equally much for it."""
        self.scored.sort(key=lambda each: (-round(each.per_cost, 9), round(each.cost_per_hour, 9), each.plan.devices))
        return self

    def front(self) -> list[Scored]:
        """Of those whose rate is known: what none of them serves more than at no more cost, the cheapest first. What `_least` gave up,
        since it cannot win per cost, may serve more for more."""
        made: list[Scored] = []
        for each in sorted(self.scored, key=lambda each: (each.cost_per_hour, -each.rate)):
            if not made or each.rate > made[-1].rate:
                made.append(each)
        return made


Shown = Callable[[str], None]


class Planner:
    """`executor`: where plans are tried, here by default. `shown` is told what is tried. `exhaustive`: simulate also what cannot win."""

    def __init__(
        self,
        bench: Bench,
        sample: Sample,
        *,
        executor: Executor | None = None,
        exhaustive: bool = False,
        shown: Shown = lambda what: None,
    ) -> None:
        self._bench, self._site, self._sample, self._executor = bench, bench.site, sample, executor
        self._slo, self._target = bench.terms.slo, bench.terms.target
        self._trier, self._exhaustive, self._shown = Trier(bench), exhaustive, shown

    def paired(self, rate: float | None = None) -> Outcome:
        """Algorithm 2. With a target `rate` each pair is taken as often as that needs."""
        outcome = Outcome()
        allowed = self._allowed(outcome)
        pairs = list(self._pairs(allowed))
        outcome.considered = len(pairs)
        self._try(pairs, outcome)
        return self._multiplied(outcome, rate) if rate is not None else outcome

    def apart(self, rate: float | None = None) -> Outcome:
        """Algorithm 1. Without a target `rate`: the numbers that balance the phases best on the devices there are."""
        outcome = Outcome()
        allowed = self._allowed(outcome)
        sides = {phase: self._of_each_kind(phase, shapes, outcome) for phase, shapes in allowed.items()}
        plans = [
            plan
            for (prefill, prompts), (decode, answers) in product(sides[Phase.PREFILL], sides[Phase.DECODE])
            if (plan := self._balanced(prefill, prompts, decode, answers, rate)) is not None
        ]
        outcome.considered = len(allowed[Phase.PREFILL]) * len(allowed[Phase.DECODE])
        if rate is None:
            self._try(plans, outcome)
            return outcome
        return self._meet(plans, rate, outcome)

    def on_host(self, rate: float | None = None, *, paired: bool) -> Outcome:
        """On one host whose cores all workers share, where what one serves depends on all the others: each number of them is tried as a
        whole, pairs alone if `paired`. With a target `rate` the fewest that serve it."""
        outcome = Outcome()
        numbers = range(1, self._site.kinds[0].space.devices)
        plans = [
            plan
            for prefill, decode in product(*self._allowed(outcome).values())
            for n, m in product(numbers, numbers)
            if self._site.fits(plan := Plan(prefill, decode, n, m)) and (n == m or not paired)
        ]
        outcome.considered = len(plans)
        if rate is None:
            self._try(plans, outcome)
            return outcome
        return self._meet(plans[:1], rate, outcome, (1, 1) if paired else None)

    def lasting(self, best: Scored) -> Probe | None:
        """The highest rate, none above that of `best`, at which enough attain of a draw that the search has not seen; None if at none down
        to half of it. A search takes the rate that its own draw flatters: with three draws for OPT-13B it found 5.25, 5.79 and 6.39
        requests/s, and of others 92, 90 and 87.5 % attained there."""
        terms, units = self._bench.terms, self._site.units(best.plan)
        top = terms.below(best.rate / units)
        rates = [terms.rate(step) * units for step in range(top, top - terms.halving, -1)]
        probes = self._in_order(rates, lambda rate: self._start(self._trier.unseen, best.plan, rate))
        return next((probe for _, probe in probes if terms.met(probe)), None)

    def fitting(self, *, paired: bool) -> list[Plan]:
        """One worker of each phase that fit, by devices and by memory, and have times, whatever the limits; if `paired`, on one node."""
        memory = {phase: [shape for shape in self._shapes() if self._lacking(phase, shape, Slo()) is None] for phase in Phase}
        if paired:
            return list(self._pairs(memory))
        apart = (Plan(prefill, decode) for prefill, decode in product(memory[Phase.PREFILL], memory[Phase.DECODE]))
        return [plan for plan in apart if self._site.fits(plan)]

    # -- what there is to try ------------------------------------------------------------------------------------------

    def _shapes(self) -> Iterator[Shape]:
        """Of all that there is, but for a device for the other phase. Of several ranks none shares cores."""
        kinds = self._site.kinds
        if self._site.host is not None:
            return iter((Shape(1, 1, kinds[0].name),))
        return (shape for kind in kinds for shape in kind.shapes(kind.space.devices - (len(kinds) == 1)))

    def _lacking(self, phase: Phase, shape: Shape, slo: Slo) -> Lost | None:
        return lacking(self._site.profile(shape), phase, shape, self._sample, slo, self._target)

    def _allowed(self, outcome: Outcome) -> dict[Phase, list[Shape]]:
        """Shapes of each phase that can serve at all; of the others why not."""
        allowed: dict[Phase, list[Shape]] = {}
        for phase in Phase:
            allowed[phase] = []
            for shape in self._shapes():
                lost = self._lacking(phase, shape, self._slo)
                if lost is None:
                    allowed[phase].append(shape)
                else:
                    outcome.lost.append(lost)
        return allowed

    def _pairs(self, allowed: dict[Phase, list[Shape]]) -> Iterator[Plan]:
        """A part of each phase on every node that the pair spans, and so both on one kind of device."""
        for prefill, decode in product(allowed[Phase.PREFILL], allowed[Phase.DECODE]):
            space = self._site.kind(prefill).space
            spans = [
                span
                for span in range(1, space.nodes + 1)
                if prefill.pp % span == 0 and decode.pp % span == 0
                and (prefill.devices + decode.devices) // span <= space.per_node
            ]  # fmt: skip
            if spans and prefill.device == decode.device:
                yield Plan(prefill, decode)

    def _bound(self, plan: Plan) -> float:
        """No rate above this is served for long, and at most 1 / target of it meets the SLO for a while."""
        return (
            min(plan.prefills * self._most(Phase.PREFILL, plan.prefill), plan.decodes * self._most(Phase.DECODE, plan.decode))
            / self._target
        )

    def _most(self, phase: Phase, shape: Shape) -> float:
        """Of one worker."""
        profile, policies = self._site.profile(shape), self._bench.policies
        if phase is Phase.PREFILL:
            return most_prompts(profile, shape, self._sample, policies)
        return most_answers(profile, shape, self._sample, self._slo, policies)

    # -- trying --------------------------------------------------------------------------------------------------------

    def _start(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> Future[R]:
        return _known(call(*arguments, **named)) if self._executor is None else self._executor.submit(call, *arguments, **named)

    def _in_order(self, items: Iterable[T], start: Callable[[T], Future[R]]) -> Iterator[tuple[T, R]]:
        """What comes of each, in order; up to `AT_ONCE` are under way."""
        under_way: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            self._shown(str(item))
            under_way.append((item, start(item)))
            if len(under_way) == AT_ONCE:
                first, future = under_way.popleft()
                yield first, future.result()
        for item, future in under_way:
            yield item, future.result()

    def _try(self, plans: Iterable[Plan], outcome: Outcome) -> None:
        """Simulate, the most promising first, as long as one can still win."""
        bounds = {plan: self._bound(plan) for plan in plans}

        def start(plan: Plan) -> Future[Scored | Lost]:
            return self._start(self._trier.plan, plan, bounds[plan], None if self._exhaustive else self._least(plan, outcome))

        for _, found in self._in_order(sorted(bounds, key=lambda plan: -self._promise(plan)), start):
            outcome.simulated += isinstance(found, Scored) or found.loss is not Loss.DOMINATED
            outcome.note(found)
        outcome.sort()

    def _least(self, plan: Plan, outcome: Outcome) -> int | None:
        """The step that the plan must serve to win over those known: theirs, if it is cheaper, or one more."""
        below = self._bench.terms.below

        def size(plan: Plan) -> tuple[float, int]:
            return self._site.units(plan), plan.devices

        return max((below(each.rate / size(each.plan)[0]) + (size(each.plan) <= size(plan)) for each in outcome.scored), default=None)

    def _promise(self, plan: Plan) -> float:
        """By which plans are ordered: requests per second and device (by cost), as far as can be told. The sooner a good plan is found, the
        more of the others are beaten at once. Of prompts it is the rate at which a wait fits into what the TTFT limit leaves beside a
        prompt alone: its mean in a queue of equal services, ρ s / 2 (1 - ρ) (Pollaczek and Khinchine), and an exponential tail."""
        profile, prompts = self._site.profile(plan.prefill), self._most(Phase.PREFILL, plan.prefill)
        if self._slo.ttft is not None:
            left = max(0.0, self._slo.ttft - idle_seconds(profile, Phase.PREFILL, plan.prefill, self._sample, self._target))
            waits = 2 * left * prompts / -math.log(1 - self._target)
            prompts *= waits / (1 + waits)
        answers = self._most(Phase.DECODE, plan.decode)
        return min(plan.prefills * prompts, plan.decodes * answers) / self._site.units(plan)

    def _of_each_kind(self, phase: Phase, shapes: Sequence[Shape], outcome: Outcome) -> list[tuple[Shape, float]]:
        """The contenders on each kind of device: there may be too few of the best kind, or both phases be best on it."""
        by_kind = ([shape for shape in shapes if shape.device == kind.name] for kind in self._site.kinds)
        return [contender for ours in by_kind for contender in self._contenders(phase, ours, outcome)]

    def _contenders(self, phase: Phase, shapes: Sequence[Shape], outcome: Outcome) -> list[tuple[Shape, float]]:
        """The best shapes of a phase on one kind of device by its rate per device, alone: the other phase takes no time."""
        found: list[tuple[Shape, float]] = []
        bounds = {shape: self._most(phase, shape) / self._target for shape in shapes}

        def start(shape: Shape) -> Future[Lost | float | None]:
            most, worst = bounds[shape] / shape.devices, found[CONTENDERS - 1] if len(found) >= CONTENDERS else None
            if worst is not None and most <= worst[1] / worst[0].devices and not self._exhaustive:
                why = f"at most {most:.3g} requests/s per device; {CONTENDERS} shapes serve more"
                return _known(Lost(f"{phase.value} {shape}", Loss.DOMINATED, why))
            return self._start(self._trier.alone, phase, shape, bounds[shape], self._sample.longest)

        for shape, rate in self._in_order(sorted(bounds, key=lambda shape: -bounds[shape] / shape.devices), start):
            if rate is None:
                rate = Lost(f"{phase.value} {shape}", Loss.SLO, f"at no rate tried do {self._target:.0%} meet the limit")
            if isinstance(rate, Lost):
                outcome.lost.append(rate)
                continue
            found.append((shape, rate))
            found.sort(key=lambda each: -each[1] / each[0].devices)
        for shape, served in found[CONTENDERS:]:
            outcome.lost.append(Lost(f"{phase.value} {shape}", Loss.DOMINATED, f"{served / shape.devices:.3g} requests/s per device"))
        return found[:CONTENDERS]

    def _balanced(self, prefill: Shape, prompts: float, decode: Shape, answers: float, rate: float | None) -> Plan | None:
        """So many workers of each that both phases serve `rate`, or as nearly equal rates as the devices allow."""
        if rate is not None:
            return Plan(prefill, decode, max(1, math.ceil(rate / prompts)), max(1, math.ceil(rate / answers)))
        shared = prefill.devices if prefill.device == decode.device else 0
        counts = [
            Plan(prefill, decode, n, m)
            for n in range(1, self._site.room(prefill) + 1)
            for m in range(1, self._site.room(decode, n * shared) + 1)
        ]

        def worth(plan: Plan) -> tuple[float, float]:
            units = self._site.units(plan)
            return min(plan.prefills * prompts, plan.decodes * answers) / units, -units

        return max(counts, key=worth, default=None)

    # -- a target rate -------------------------------------------------------------------------------------------------

    def _multiplied(self, outcome: Outcome, rate: float) -> Outcome:
        """Each pair as often as the target rate needs, and simulated so."""
        units, outcome.scored = outcome.scored[: 2 * CONTENDERS], []
        counts = {unit.plan: max(1, math.ceil(rate / unit.rate)) for unit in units}
        plans = [Plan(unit.prefill, unit.decode, count, count) for unit, count in counts.items()]
        return self._meet(plans, rate, outcome, step=(1, 1))

    def _meet(self, plans: Iterable[Plan], rate: float, outcome: Outcome, step: tuple[int, int] | None = None) -> Outcome:
        """Each with as many workers as the rate takes."""
        for _, (found, tried) in self._in_order(plans, lambda plan: self._start(self._trier.meet, plan, rate, self._site, step)):
            outcome.simulated += tried
            outcome.note(found)
        return outcome.sort()


def _known(value: R) -> Future[R]:
    """What need not be tried."""
    done: Future[R] = Future()
    done.set_result(value)
    return done
