"""The seam to the lane: one ordered, bidirectional stream of messages between two workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from ..core.transfer import LaneMessage


class Lane(Protocol):
    """Both ends look the same. Iterating ends when the peer closes, and raises `DiptychError` when the lane breaks."""

    def send(self, message: LaneMessage) -> None:
        """Never blocks; what is sent on a lane that is closed or broken is dropped."""
        ...

    def __aiter__(self) -> AsyncIterator[LaneMessage]: ...

    def close(self) -> None: ...


DialLane = Callable[[str], Awaitable[Lane]]
"""Opens a lane to a worker's address (host:port)."""
