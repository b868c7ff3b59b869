"""Figures of a simulation, in memory that does not grow with it: histograms, and time lines of bounded length. Pure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from .agenda import GRID

STEP = 1.005
"""Width of a histogram's bins, as a factor: a percentile is right to half a percent."""
LENGTH = 256
"""Entries of a time line; when it is full, two become one."""
_SMALLEST = 1e-6
_WIDTH = math.log(STEP)


def _bin(seconds: float) -> int:
    return int(math.log(seconds / _SMALLEST) / _WIDTH) if seconds > _SMALLEST else 0


class Histogram:
    """Of seconds, in bins of equal ratio. Their sum is kept in steps of the agenda's grid, whole numbers: it has no rounding either, in
    whatever order they come."""

    def __init__(self) -> None:
        self.count = 0
        self.most = 0.0
        self._total = 0
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float, times: int = 1) -> None:
        self.count += times
        self._total += round(seconds / GRID) * times
        self.most = max(self.most, seconds)
        self._bins[_bin(seconds)] += times

    def add_rising(self, first: float, more: float, count: int, times: int = 1) -> None:
        """`count` values, each by `more` above the one before, all of them `times`."""
        if not count:
            return
        last = first + (count - 1) * more
        self.count += count * times
        self._total += (round(first / GRID) * count + round(more / GRID) * (count * (count - 1) // 2)) * times
        self.most = max(self.most, last)
        bins, low, highest, begin = self._bins, _bin(first), _bin(last), 0
        while low < highest:
            end = int((_SMALLEST * math.pow(STEP, low + 1) - first) / more)  # or one beside it: a bin's border has rounding
            end = min(max(end, begin + 1), count - 1)
            while _bin(first + (end - 1) * more) > low:
                end -= 1
            while (following := _bin(first + end * more)) == low:
                end += 1
            bins[low] += (end - begin) * times
            begin, low = end, following
        bins[highest] += (count - begin) * times

    @property
    def mean(self) -> float:
        return self._total * GRID / self.count if self.count else 0.0

    def percentile(self, share: float) -> float:
        """Nearest rank, to the middle of its bin; 0 of nothing."""
        wanted, seen = max(1, math.ceil(share * self.count)), 0
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen >= wanted:
                return min(self.most, _SMALLEST * math.pow(STEP, number + 0.5))
        return 0.0

    def as_json(self) -> dict[str, float] | None:
        if not self.count:
            return None
        shares = {f"p{round(100 * share)}": self.percentile(share) for share in (0.5, 0.9, 0.99)}
        return {"count": self.count, "mean": self.mean, **shares, "max": self.most}


@dataclass(slots=True)
class Course:
    """A value over time, as means of equal stretches. It is set whenever it changes."""

    width: float = 1.0
    sums: list[float] = field(default_factory=lambda: [0.0])
    value: float = 0.0
    since: float = 0.0
    until: float = 0.0
    """The end of the last stretch."""

    def put(self, now: float, value: float) -> None:
        """It is `value` from `now` on."""
        self._spread(now)
        self.value = value

    def add(self, begin: float, end: float) -> None:
        """It is 1 from `begin` to `end`, and was 0 since the last of these."""
        self.since = max(self.since, begin)
        self.value = 1.0
        self._spread(end)
        self.value = 0.0

    def _spread(self, now: float) -> None:
        if self.since < now <= self.until:  # so it is nearly always
            self.sums[-1] += self.value * (now - self.since)
            self.since = now
            return
        while now >= self.width * LENGTH:
            self.sums = [sum(self.sums[i : i + 2]) for i in range(0, len(self.sums), 2)]
            self.width *= 2
        while self.since < now:
            index = min(int(self.since / self.width), LENGTH - 1)
            end = min(now, (index + 1) * self.width)
            if end <= self.since:  # a border that floating point puts on both sides
                end = min(now, (index + 2) * self.width)
            while len(self.sums) <= index:
                self.sums.append(0.0)
            self.sums[index] += self.value * (end - self.since)
            self.since = end
        self.until = len(self.sums) * self.width

    def mean(self, end: float) -> float:
        self._spread(end)
        return sum(self.sums) / end if end else 0.0

    def as_json(self, end: float) -> dict[str, object]:
        self._spread(end)
        return {"every_s": self.width, "mean": [round(total / self.width, 4) for total in self.sums]}


@dataclass(slots=True)
class WorkerCourse:
    """What a worker's time went by with: seconds in steps, requests that wait and that run, and the share of KV in use."""

    busy: float = 0.0
    use: Course = field(default_factory=Course)
    queued: Histogram = field(default_factory=Histogram)
    waiting: Course = field(default_factory=Course)
    running: Course = field(default_factory=Course)
    kv: Course = field(default_factory=Course)

    def computed(self, begin: float, seconds: float) -> None:
        """A step, or several, one after the other; none begins before the last has ended."""
        self.busy += seconds
        self.use.add(begin, begin + seconds)

    def put(self, now: float, waiting: int, running: int, kv: float) -> None:
        if waiting != self.waiting.value:
            self.waiting.put(now, waiting)
        if running != self.running.value:
            self.running.put(now, running)
        if kv != self.kv.value:
            self.kv.put(now, kv)

    def as_json(self, end: float) -> dict[str, object]:
        return {
            "utilisation": min(1.0, self.busy / end) if end else 0.0,
            "queue_time": self.queued.as_json(),
            "utilisation_over_time": self.use.as_json(end),
            "waiting": self.waiting.as_json(end),
            "running": self.running.as_json(end),
            "kv_in_use": self.kv.as_json(end),
        }
