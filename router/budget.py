"""How many retries the whole fleet may see: a token bucket, so that a sick fleet is not buried under second attempts. Pure."""

from __future__ import annotations

SHARE = 0.2
"""Retries each accepted request earns: sustained, at most every fifth request is tried twice."""
BURST = 64
"""Retries that may come at once: what one worker was decoding when it died (decode.max_running is 32 by default), twice."""
FLOOR_PER_S = 1.0
"""Retries earned per second whatever the traffic, so that a quiet cluster can always retry."""


class RetryBudget:
    def __init__(self, now: float) -> None:
        self._left = float(BURST)
        self._since = now

    def accepted(self) -> None:
        """A request was accepted: it earns its share."""
        self._left = min(BURST, self._left + SHARE)

    def take(self, now: float) -> bool:
        """Whether one more retry may be made now; if so it is paid for."""
        self._left = min(BURST, self._left + (now - self._since) * FLOOR_PER_S)
        self._since = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
