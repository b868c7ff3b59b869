"""Simulated time: what is to happen when. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

Entry = tuple[float, int, Callable[..., None], tuple[Any, ...]]
"""When, the number by which it was asked for, and what is to be done."""
GRID = 2.0**-40
"""Seconds, about one picosecond. Multiples of it below 2 hours add up without rounding, so that many steps at once end, to the last bit,
when they would end one by one."""


def on_grid(seconds: float) -> float:
    """The nearest multiple of `GRID`."""
    return round(seconds / GRID) * GRID


class Agenda:
    """`now` in seconds from the begin, on the grid; it moves only in `run`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._entries: list[Entry] = []
        self._posted: deque[Entry] = deque()
        """Those that all come so long after they were asked for: in the order in which they come. Two of three are such, and a heap would
        sort them in among as many that are far away."""
        self._made = 0

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """What falls on one moment is done in the order in which it was asked for; what is asked for too late, at once."""
        self._made += 1
        when = round(when / GRID) * GRID  # `on_grid`, without the call: it is asked for a dozen times a request
        heapq.heappush(self._entries, (when if when > self.now else self.now, self._made, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def post(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """As `after`; it is best if `seconds` is always the same."""
        when = round((self.now + seconds) / GRID) * GRID
        if self._posted and when < self._posted[-1][0]:
            self.at(when, call, *arguments)
            return
        self._made += 1
        self._posted.append((when, self._made, call, arguments))

    def run(self, stop: Callable[[], bool] | None = None) -> None:
        """Until nothing is left to do, or `stop` says so."""
        entries, posted = self._entries, self._posted
        while (entries or posted) and (stop is None or not stop()):
            first = posted.popleft() if posted and not (entries and entries[0] < posted[0]) else heapq.heappop(entries)
            self.now, _, call, arguments = first
            call(*arguments)
