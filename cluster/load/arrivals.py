"""When requests come: endless times of an open-loop load. Times are seconds from its begin."""

from __future__ import annotations

import random
from collections.abc import Iterator


def gamma(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Arrivals with gamma-distributed gaps of mean 1 / `rate` (requests per second) and shape `burstiness`.

    Shape 1 is a Poisson process; below 1 requests come in bursts, above 1 more evenly (the variance of a gap is
    1 / (burstiness · rate²)). The same seed gives the same times, scaled with 1 / rate.
    """
    draw, now = random.Random(f"arrivals {seed}"), 0.0
    while True:
        now += draw.gammavariate(burstiness, 1 / burstiness) / rate
        yield now


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrivals of a Poisson process of `rate` requests per second."""
    return gamma(rate, 1.0, seed)


def constant(rate: float) -> Iterator[float]:
    """One arrival every 1 / `rate` seconds, the first at once."""
    number = 0
    while True:
        yield number / rate  # not a running sum, whose rounding would grow
        number += 1
