"""The search for the highest rate at which enough requests meet the SLO: bracket, then bisect.

What is found is as sure as its probes: each rate is tried until the interval of its attainment excludes the target, at a stated
confidence, or its budget ends. The search assumes that attainment falls as the rate grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .summary import wilson

FIRST_LOOK = 30
"""Requests before a probe is judged for the first time. So few can show that 90 % is missed, not that it is met: for that even a
probe without a miss needs 35 at 95 %."""


class Verdict(StrEnum):
    MET = "met"
    MISSED = "missed"
    OPEN = "open"
    """The interval still holds the target."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How a probe of one rate is judged: at `looks` numbers of requests, by the interval of its attainment.

    Looking several times finds what is not there more often than looking once, so each look has its share of what the confidence
    leaves to chance (Bonferroni).
    """

    target: float
    confidence: float
    looks: tuple[int, ...]

    @classmethod
    def growing(cls, target: float, confidence: float, most: int) -> Trial:
        """Looks at 30, 60, 120, … and at last at `most` requests."""
        looks = [FIRST_LOOK]
        while looks[-1] * 2 < most:
            looks.append(looks[-1] * 2)
        if looks[-1] < most:
            looks.append(most)
        return cls(target, confidence, tuple(looks))

    @property
    def most(self) -> int:
        return self.looks[-1]

    def interval(self, met: int, total: int) -> tuple[float, float]:
        return wilson(met, total, 1 - (1 - self.confidence) / len(self.looks))

    def judge(self, met: int, total: int) -> Verdict:
        low, high = self.interval(met, total)
        return Verdict.MET if low > self.target else Verdict.MISSED if high < self.target else Verdict.OPEN


class Tally:
    """Which requests met the SLO, judged in the order of their sending: those that end first are the short and the lucky ones."""

    def __init__(self) -> None:
        self.met = 0
        self.total = 0
        self._ahead: dict[int, bool] = {}

    def add(self, number: int, met: bool) -> None:
        """Request `number`, counted from 0, has ended. `met` and `total` go on as far as every earlier one has."""
        self._ahead[number] = met

    def advance(self, most: int) -> bool:
        """Count requests up to `most`; whether so many are counted."""
        while self.total < most and self.total in self._ahead:
            self.met += self._ahead.pop(self.total)
            self.total += 1
        return self.total == most


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate tried: `met` of `total` requests met the SLO, a share between `low` and `high` at the trial's confidence. `lag` is how
    late the client sent, p99 in seconds."""

    rate: float
    met: int
    total: int
    low: float
    high: float
    verdict: Verdict
    lag: float = 0.0

    @property
    def share(self) -> float:
        return self.met / self.total if self.total else 0.0


@dataclass(slots=True)
class Search:
    """Which rate to try next, from what earlier ones gave. Rates are requests per second.

    Doubles or halves from `start` until the target lies between two rates, then halves what lies between until they are within
    `tolerance` of each other. An open probe moves the search by its share, but proves nothing.
    """

    target: float
    start: float
    tolerance: float = 0.05
    floor: float = 1 / 64
    ceiling: float = 4096.0
    probes: list[Probe] = field(default_factory=list)

    def next_rate(self) -> float | None:
        """None when there is no more to find."""
        good, bad = self._good(), self._bad()
        if good is None and bad is None:
            return self.start
        if bad is None:
            assert good is not None
            return good * 2 if good * 2 <= self.ceiling else None
        if good is None:
            return bad / 2 if bad / 2 >= self.floor else None
        return None if bad <= good * (1 + self.tolerance) else (good + bad) / 2

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)

    def _seems_met(self, probe: Probe) -> bool:
        return probe.verdict is Verdict.MET or (probe.verdict is Verdict.OPEN and probe.share >= self.target)

    def _bad(self) -> float | None:
        return min((probe.rate for probe in self.probes if not self._seems_met(probe)), default=None)

    def _good(self) -> float | None:
        bad = self._bad()
        return max((probe.rate for probe in self.probes if self._seems_met(probe) and (bad is None or probe.rate < bad)), default=None)

    def found(self) -> Goodput:
        good, bad = self._good(), self._bad()
        proven = [probe.rate for probe in self.probes if probe.verdict is Verdict.MET and (bad is None or probe.rate < bad)]
        refuted = [probe.rate for probe in self.probes if probe.verdict is Verdict.MISSED]
        return Goodput(good, max(proven, default=None), min(refuted, default=None), self.next_rate() is None)


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate`: the highest that met the target by its share. `proven` met it and `refuted` missed it at the confidence of a probe.
    `complete`: the search went to its end, not only to that of its budget."""

    rate: float | None
    proven: float | None
    refuted: float | None
    complete: bool
