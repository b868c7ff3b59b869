"""The seam to the lane: one ordered, bidirectional stream of messages between two workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from ..core.transfer import LaneMessage


class Lane(Protocol):
    """Both ends look the same."""

    def send(self, message: LaneMessage) -> None:
        """Never blocks; what is sent on a lane that is closed or broken is dropped."""
        ...

    async def each(self, take: Callable[[LaneMessage], None]) -> None:
        """Have every message of the peer's taken as it comes. Returns when the peer closes, raises `DiptychError` when the lane breaks, and
        what `take` raised."""
        ...

    def close(self) -> None: ...


DialLane = Callable[[str], Awaitable[Lane]]
"""Opens a lane to a worker's address (host:port)."""
