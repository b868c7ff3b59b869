"""Wakes a shell when its machine's next deadline is due, or was before it moved, and never otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..core.clock import Clock


class Alarm:
    """Calls `ring` on the running loop, at the latest when it is the time that `next_deadline()` gave when `set` was last called; and then
    sets itself. A deadline that moves away, as a lease's does with every piece, costs nothing."""

    def __init__(self, clock: Clock, next_deadline: Callable[[], float | None], ring: Callable[[], None]) -> None:
        self._clock = clock
        self._next_deadline = next_deadline
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        due = self._next_deadline()
        if self._due is not None and due is not None and due >= self._due:
            return
        self.cancel()
        if due is not None:
            self._due = due
            self._timer = self._loop.call_later(max(0.0, due - self._clock.now()), self._rang)

    def cancel(self) -> None:
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rang(self) -> None:
        self.cancel()
        self._ring()
        self.set()
