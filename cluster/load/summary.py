"""Figures of a sample, and how sure a share is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of `count` values in seconds; percentiles are nearest-rank."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ascending values that at least `share` of all do not exceed (nearest rank; no interpolation)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(values: Sequence[float]) -> Summary | None:
    """None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Summary(len(ordered), fmean(ordered), p50, p90, p99, ordered[-1])


def wilson(met: int, total: int, confidence: float) -> tuple[float, float]:
    """The score interval of a share, `met` of `total` ≥ 1 (E. B. Wilson, JASA 22, 1927, eq. 4), two-sided."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = met / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / total / 4)
    return (0.0 if met == 0 else middle - half), (1.0 if met == total else middle + half)
