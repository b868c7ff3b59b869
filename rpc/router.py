"""A router as the supervisor and the command line see it: it is told the fleet, and tells what it sees of it."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from ..core.fleet import Fleet, WorkerReport
from ..core.security import TlsFiles
from ..core.workload import Window
from ..proto.worker_pb2 import DESCRIPTOR, DescribeFleetRequest, DescribeWorkloadRequest, PublishFleetResponse
from .channels import ANSWER_S, call_unary, open_internal_channel
from .codec_fields import parse
from .codec_fleet import decode_fleet_status, encode_fleet
from .codec_workload import decode_window

_METHODS = DESCRIPTOR.services_by_name["Router"].methods_by_name


class RouterFace(Protocol):
    """What a router implements to be served; called on the event loop's thread."""

    def publish(self, fleet: Fleet) -> int:
        """Take `fleet` if its version is higher than any seen; the highest version known afterwards."""
        ...

    def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        """The fleet in use, and the latest reports of its live workers."""
        ...

    def window(self, seconds: float) -> Window:
        """The load of the last `seconds`."""
        ...


class RouterClient:
    """A connection to the router at `address` (host:port)."""

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        self.address = address
        self._peer = f"router at {address}"
        self._channel = open_internal_channel(address, tls)

    async def publish(self, fleet: Fleet) -> int:
        """Publish `fleet`; the highest version the router knows. Raises `Unavailable` when it cannot be reached, `DeadlineExceeded`
        when it does not answer."""
        method = _METHODS["PublishFleet"]
        answer = await call_unary(self._channel, method, encode_fleet(fleet), timeout_s=ANSWER_S, peer=self._peer)
        return parse(PublishFleetResponse, answer).version

    async def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        """The router's fleet and the latest reports of its live workers."""
        request = DescribeFleetRequest().SerializeToString()
        method = _METHODS["DescribeFleet"]
        return decode_fleet_status(await call_unary(self._channel, method, request, timeout_s=ANSWER_S, peer=self._peer))

    async def window(self, seconds: float) -> Window:
        """The load of the last `seconds`, as far as the router remembers."""
        request = DescribeWorkloadRequest(seconds=seconds).SerializeToString()
        method = _METHODS["DescribeWorkload"]
        return decode_window(await call_unary(self._channel, method, request, timeout_s=ANSWER_S, peer=self._peer))

    async def close(self) -> None:
        """End everything on this connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
