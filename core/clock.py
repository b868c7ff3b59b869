"""Time as a value: policies are given `now`; shells own a `Clock`; tests and the simulator move a `ManualClock`."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary origin, never going back. Not a date, and meaningless on another host."""
        ...


class MonotonicClock:
    """The system's monotonic clock (on Linux one origin for all processes of a host)."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> float:
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        self._now += seconds
        return self._now
