"""How long a prompt that a decode worker reads itself waits for that to begin. Pure; seconds of the caller's clock."""

from __future__ import annotations

from collections.abc import Iterable


class Waits:
    """By attempt id, from its arrival to its first step; what it waited is taken once."""

    def __init__(self) -> None:
        self._arrived: dict[str, float] = {}
        self._waited: dict[str, float] = {}

    def arrived(self, attempt_id: str, now: float) -> None:
        self._arrived[attempt_id] = now

    def began(self, attempt_ids: Iterable[str], now: float) -> None:
        """These are in a step; most of them have been in one before."""
        if not self._arrived:
            return
        for attempt_id in self._arrived.keys() & set(attempt_ids):
            self._waited[attempt_id] = max(0.0, now - self._arrived.pop(attempt_id))

    def take(self, attempt_id: str) -> float | None:
        return self._waited.pop(attempt_id, None) if self._waited else None

    def forget(self, attempt_id: str) -> None:
        """It is over."""
        self._arrived.pop(attempt_id, None)
        self._waited.pop(attempt_id, None)
