"""A worker as others see it: the face it implements, and the client that routers and the supervisor use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Protocol, Self

from ..core.commands import Command, StepEvents
from ..core.fleet import WorkerReport
from ..core.security import TlsFiles
from ..proto.worker_pb2 import DESCRIPTOR, DrainRequest, DrainResponse, WatchRequest
from .channels import ANSWER_S, ClientCall, call_stream, call_unary, open_internal_channel
from .codec_commands import decode_command, decode_step_events, encode_command, encode_step_events
from .codec_fields import parse
from .codec_fleet import decode_report
from .credentials import current
from .lane import Lane
from .stream import ByteCall, Stream, alone

_METHODS = DESCRIPTOR.services_by_name["Worker"].methods_by_name


class RouterStream(Stream[StepEvents, Command]):
    """A worker's end of the stream to one router: `async for command in stream`; `send(step_events)` never blocks, and a router
    that does not read is cut."""

    def __init__(self, call: ByteCall, *, peer: str) -> None:
        super().__init__(call, encode_step_events, alone(decode_command), peer=peer)


class WorkerStream(Stream[Command, StepEvents]):
    """A router's end of the stream to one worker: `send(command)` never blocks; `async for step_events in stream`; `close()`
    stops every attempt on it."""

    def __init__(self, call: ByteCall, *, peer: str) -> None:
        super().__init__(call, encode_command, alone(decode_step_events), peer=peer)


class WorkerFace(Protocol):
    """What a worker implements to be served. All is called on the event loop's thread, once per peer, concurrently."""

    async def attached(self, stream: RouterStream) -> None:
        """Serve one router until the iteration over `stream` ends; then stop everything that came on it and return.

        The stream ends when this returns; an error raised becomes the stream's status. It is not cancelled when the router goes
        away: the iteration ends instead.
        """
        ...

    def reports(self) -> AsyncGenerator[WorkerReport, None]:
        """Reports for one watcher, on change and at least once a second; closed when the watcher goes away."""
        ...

    async def lane(self, lane: Lane) -> None:
        """Serve one lane until it ends; as with `attached`, returning ends it (what is queued is still sent)."""
        ...

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new and return when all work has ended or after `timeout_s` seconds: the number of unfinished attempts."""
        ...


class WorkerClient:
    """A connection to the worker at `address` (host:port). Connects when first used, and again after it was lost."""

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        """`tls`: what this process shows, and by what it knows the other."""
        self.address = address
        self._peer = f"worker at {address}"
        self._tls = tls
        self._shown = None if tls is None else current(tls)
        self._channel = open_internal_channel(address, tls)

    def attach(self) -> WorkerStream:
        """Open the stream of commands and events. A worker that cannot be reached shows as `Unavailable` in the iteration."""
        if self._tls is not None and current(self._tls) is not self._shown:
            self._renew(self._tls)
        return WorkerStream(ClientCall(self._channel, _METHODS["Attach"], peer=self._peer), peer=self._peer)

    def _renew(self, tls: TlsFiles) -> None:
        """A channel with the certificates as they are now: one keeps those it was opened with, which may have expired when it must connect
        again."""
        self._shown = current(tls)
        old, self._channel = self._channel, open_internal_channel(self.address, tls)
        self._closing = asyncio.get_running_loop().create_task(old.close(None))

    async def watch(self) -> AsyncGenerator[WorkerReport, None]:
        """The worker's reports, until closed; raises `Unavailable` when the worker is gone."""
        request = WatchRequest().SerializeToString()
        async with aclosing(call_stream(self._channel, _METHODS["Watch"], request, timeout_s=None, peer=self._peer)) as reports:
            async for report in reports:
                yield decode_report(report)

    async def drain(self, timeout_s: float) -> int:
        """Tell the worker to take nothing new; the number of attempts that had not ended after `timeout_s` seconds."""
        request = DrainRequest(timeout=timeout_s).SerializeToString()
        answer = await call_unary(self._channel, _METHODS["Drain"], request, timeout_s=timeout_s + ANSWER_S, peer=self._peer)
        return parse(DrainResponse, answer).unfinished

    async def close(self) -> None:
        """End everything on this connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
