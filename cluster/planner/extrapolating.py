"""Times of workers with a number of shards that nobody measured, from those that somebody has. Pure.

Each term is a part that shards share out and one that they do not: x / tp + y. With the terms of three or more tps known, how far these
are from that law says how far off a derived one may be.
"""

from __future__ import annotations

from collections.abc import Sequence

from .latency import DecodeTimes, PrefillTimes, StepTimes
from .profile import Parallelism, Profile

TWO, ONE = 0.25, 0.5
"""By which share derived times may be off where two tps, or one, are known."""


def extended(profile: Profile, tps: Sequence[int]) -> Profile:
    """The profile with times for these tps too; what it has already stays as it is."""
    known = profile.parallelisms
    derived = [_derived(known, tp) for tp in tps if profile.parallelism(tp) is None]
    return profile.model_copy(update={"parallelisms": tuple(sorted((*known, *derived), key=lambda each: each.tp))})


def _derived(known: Sequence[Parallelism], tp: int) -> Parallelism:
    tps = [each.tp for each in known]
    worst = 0.0

    def term(values: Sequence[float]) -> float:
        nonlocal worst
        shared, fixed = law(tps, values)
        misfits = [abs(shared / at + fixed - value) / value for at, value in zip(tps, values, strict=True) if value > 0]
        worst = max(worst, *misfits) if misfits else worst
        return shared / tp + fixed

    prefills, decodes = [each.times.prefill for each in known], [each.times.decode for each in known]
    larges = [each.times.decode_large or each.times.decode for each in known]
    times = known[0].times.model_copy(
        update={
            "prefill": PrefillTimes(**{name: term([getattr(each, name) for each in prefills]) for name in PrefillTimes.model_fields}),
            "decode": DecodeTimes(**{name: term([getattr(each, name) for each in decodes]) for name in DecodeTimes.model_fields}),
            "decode_large": DecodeTimes(**{name: term([getattr(each, name) for each in larges]) for name in DecodeTimes.model_fields}),
            "both_row": None,
        }
    )
    error = {1: ONE, 2: TWO}.get(len(known), max(0.1, worst))
    return Parallelism(tp=tp, times=StepTimes.model_validate(times.model_dump()), error=error)


def law(tps: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """x, y >= 0 of x / tp + y with the least squares of relative errors. Of one tp: all is shared out."""
    if len(tps) == 1:
        return values[0] * tps[0], 0.0
    rows = [(1 / tp / value, 1 / value) for tp, value in zip(tps, values, strict=True) if value > 0]
    if len(rows) < 2:
        return 0.0, 0.0
    aa, ab, bb = (sum(u * v for u, v in pairs) for pairs in _products(rows))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    shared, fixed = (a * bb - b * ab) / determinant, (aa * b - ab * a) / determinant
    if shared < 0:
        return 0.0, b / bb
    return (a / aa, 0.0) if fixed < 0 else (shared, fixed)


def _products(rows: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], ...]:
    return [(x, x) for x, _ in rows], [(x, y) for x, y in rows], [(y, y) for _, y in rows]
