"""When a process that died is started again. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class RestartBudget:
    """At most `most` restarts in any `window_s` seconds, each after twice the delay of the one before (`first_s`, at most `cap_s`).

    One that has run for `window_s` begins again at `first_s`.
    """

    most: int = 5
    window_s: float = 300.0
    first_s: float = 0.5
    cap_s: float = 15.0
    _deaths: deque[float] = field(default_factory=deque)

    def delay(self, now: float) -> float | None:
        """Seconds to wait after a death at `now` before the next start; None: give up."""
        while self._deaths and self._deaths[0] <= now - self.window_s:
            self._deaths.popleft()
        if len(self._deaths) == self.most:
            return None
        self._deaths.append(now)
        return min(self.cap_s, self.first_s * 2.0 ** (len(self._deaths) - 1))
