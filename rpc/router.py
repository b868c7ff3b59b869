"""A router as the supervisor and the command line see it: it is told the fleet, and tells what it sees of it."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from ..core.fleet import Fleet, WorkerReport


class RouterFace(Protocol):
    """What a router implements to be served; called on the event loop's thread."""

    def publish(self, fleet: Fleet) -> int:
        """Take `fleet` if its version is higher than any seen; the highest version known afterwards."""
        ...

    def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        """The fleet in use, and the latest reports of its live workers."""
        ...


class RouterClient:
    """A connection to the router at `address` (host:port)."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def publish(self, fleet: Fleet) -> int:
        """Publish `fleet`; the highest version the router knows. Raises `Unavailable` when it does not answer in time."""
        raise NotImplementedError

    async def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        """The router's fleet and the latest reports of its live workers."""
        raise NotImplementedError

    async def close(self) -> None:
        """End everything on this connection."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
