"""The way of messages between two simulated workers. Pure."""

from __future__ import annotations

from typing import Protocol

from ...core.transfer import LaneMessage
from ...core.value import value


class End(Protocol):
    """A worker at one end of a lane."""

    def received(self, lane: int, message: LaneMessage) -> None: ...


@value
class Lane:
    """Its two ends, each with the number by which its machine calls it."""

    source: End
    at_source: int
    destination: End
    at_destination: int

    def to_destination(self, message: LaneMessage) -> None:
        self.destination.received(self.at_destination, message)

    def to_source(self, message: LaneMessage) -> None:
        self.source.received(self.at_source, message)
