"""Where no plan serves: the limits that would have to be looser, by how little, and a plan that then works, by simulation. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...core.fleet import Phase
from ..load.slo import Slo
from .goodput import FLOOR, Bench
from .shapes import Plan, Sample, idle_seconds

GROWTH = 1.02
"""Limits are tried in such steps."""
MOST = 200
"""Of them: a limit fifty times as long."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """`binding`: the limits that are too short for any plan; with `limits` in their place `plan` serves."""

    binding: tuple[str, ...]
    limits: Slo
    plan: Plan


def nearest(bench: Bench, plans: Sequence[Plan], sample: Sample) -> Nearest | None:
    """Of `plans`, which have memory and times, the one whose limits need grow least, by the larger of the two factors."""
    slo, target = bench.terms.slo, bench.terms.target
    assert slo.ttft is not None
    assert slo.tpot is not None

    def alone(plan: Plan) -> tuple[float, float]:
        return (
            idle_seconds(bench.site.profile(plan.prefill), Phase.PREFILL, plan.prefill, sample, target),
            idle_seconds(bench.site.profile(plan.decode), Phase.DECODE, plan.decode, sample, target),
        )

    def factor(plan: Plan) -> float:
        ttft, tpot = alone(plan)
        return max(1.0, ttft / slo.ttft, tpot / slo.tpot)  # type: ignore[operator]

    if not plans:
        return None
    plan = min(plans, key=lambda plan: (factor(plan), bench.site.units(plan)))
    ttft, tpot = alone(plan)
    binding = tuple(name for name, least, limit in (("TTFT", ttft, slo.ttft), ("TPOT", tpot, slo.tpot)) if least > limit)
    for step in range(MOST):
        grown = GROWTH**step
        limits = Slo(_limit(slo.ttft, ttft, grown, binding, "TTFT"), _limit(slo.tpot, tpot, grown, binding, "TPOT"))
        tried = replace(bench, terms=replace(bench.terms, slo=limits))
        if bench.terms.met(tried.probe(bench.site.cluster(plan), FLOOR)):
            return Nearest(binding or ("TTFT", "TPOT"), limits, plan)
    return None


def _limit(limit: float, least: float, grown: float, binding: tuple[str, ...], name: str) -> float:
    """In whole milliseconds. Where neither binds alone both grow: requests miss the one or the other."""
    wanted = max(limit, least) * grown if name in binding or not binding else limit
    return limit if wanted <= limit else math.ceil(1000 * wanted) / 1000
