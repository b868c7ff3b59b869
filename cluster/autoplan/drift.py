"""Whether the load is another than the one that was planned for: larger than chance, and large enough to matter. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import hypot, log

from ..load.workload import Arrival
from .figures import Figures

MATTERS = 1.25
"""A rate or a length that has changed by less than this factor changes no plan."""
HITS_MATTER = 0.1
CUT = 0.25
"""What of a load that changes within itself is left out at a time. Where it was half of it, a turn to 1.7 requests a second, of which 30
are judged, could be seen after 27 s in the mean, and not after 19."""
SURE = 4.0
"""Standard errors: by chance, one look in 16,000 finds so much (for each of four figures)."""


@dataclass(frozen=True, slots=True)
class Shift:
    """`errors`: the change in standard errors."""

    what: str
    before: float
    now: float
    errors: float

    def __str__(self) -> str:
        return f"{self.what} {self.before:.3g} → {self.now:.3g} ({self.errors:.0f} standard errors)"


def shifts(planned: Figures, recent: Figures) -> tuple[Shift, ...]:
    """What has changed between the load that was planned for and the recent one."""
    pairs = (("rate", planned.rate, recent.rate), ("prompt", planned.prompt, recent.prompt), ("output", planned.output, recent.output))
    found = []
    for what, before, now in pairs:
        change, error = abs(log(now.value / before.value)), hypot(before.spread, now.spread)
        if change > log(MATTERS) and change > SURE * error:
            found.append(Shift(what, before.value, now.value, change / error if error else float("inf")))
    change, error = abs(recent.hits - planned.hits), hypot(planned.hits_error, recent.hits_error)
    if change > HITS_MATTER and change > SURE * error:
        found.append(Shift("hits", planned.hits, recent.hits, change / error if error else float("inf")))
    return tuple(found)


def settled(arrivals: list[Arrival], seconds: float, least: int) -> tuple[list[Arrival], float] | None:
    """The newest part of a load that does not change within itself, with times from its begin and its length in seconds; None while that
    has fewer than `least` requests: a plan for a mixture of two loads would suit neither."""
    while len(arrivals) >= least:
        middle = seconds / 2
        later = [arrival for arrival in arrivals if arrival.at >= middle]
        earlier = arrivals[: len(arrivals) - len(later)]
        if min(len(earlier), len(later)) < 2:  # nothing came for half of the time
            changed = len(arrivals) >= 10
        else:
            changed = bool(shifts(Figures.of(earlier, middle), Figures.of(later, middle)))
        if not changed:
            return arrivals, seconds
        begin = CUT * seconds
        arrivals, seconds = [replace(each, at=each.at - begin) for each in arrivals if each.at >= begin], seconds - begin
    return None
