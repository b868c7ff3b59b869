"""What a worker shows to routers, to its peers and to the supervisor: rpc's `WorkerFace` over an engine loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from ..core.commands import Command
from ..core.errors import Unavailable
from ..core.fleet import WorkerReport, WorkerState
from ..core.recordings import Doing
from ..core.spans import span
from ..rpc.lane import Lane
from ..rpc.worker import RouterStream
from .outbox import Call, Delivery, Listener

REPORT_EVERY_S = 1.0
"""A worker that changes nothing still says so this often."""
REPORT_GAP_S = 0.25
"""And one that changes at every step reports no more often than this, but at once when it begins to have something to do, has nothing
more, or changes its state. With 0.05 here reports were a fifth of what a prompt cost all processes beside the engines: 0.3 ms each."""


class Commanded(Protocol):
    """A role, as its face sees it. Called on the loop's thread."""

    def command(self, listener: Listener, command: Command) -> None: ...

    def detached(self, listener: Listener) -> None:
        """Stop every attempt of a router that is gone."""
        ...

    def drain(self) -> None:
        """Take nothing new from now on, and tell the routers what they may have done elsewhere (`Movable`)."""
        ...


class Face:
    """Joins one worker's streams to its loop. Lives on the asyncio thread."""

    def __init__(
        self,
        role: Commanded,
        *,
        post: Callable[[Call], None],
        first_report: WorkerReport,
        serve_lane: Callable[[Lane], Awaitable[None]] | None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`serve_lane` None: a worker nobody hands KV to. `check` raises if the transfers' books are wrong; asked when idle."""
        self._role, self._post, self._serve_lane, self._check = role, post, serve_lane, check
        self._report, self._idle = first_report, True
        self._changed = asyncio.Event()
        self._turned = asyncio.Event()

    def deliver(self, delivery: Delivery) -> None:
        """Carry out what the loop's last turn asked for."""
        with span(Doing.DELIVER):
            for call in delivery.calls:
                call()
            for listener, events in delivery.events:
                listener.send(events)
        if delivery.report is None:
            return
        turned = (delivery.idle, delivery.report.state) != (self._idle, self._report.state)
        self._report, self._idle = delivery.report, delivery.idle
        if self._idle and self._check is not None:
            self._check()
        self._changed.set()
        self._changed = asyncio.Event()
        if turned:
            self._turned.set()
            self._turned = asyncio.Event()

    async def attached(self, stream: RouterStream) -> None:
        try:
            await stream.each(lambda command: self._post(partial(self._role.command, stream, command)))
        finally:
            self._post(partial(self._role.detached, stream))

    async def reports(self) -> AsyncGenerator[WorkerReport, None]:
        while True:
            changed, turned = self._changed, self._turned
            yield self._report
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_GAP_S):
                    await turned.wait()
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY_S - REPORT_GAP_S):
                    await changed.wait()

    async def lane(self, lane: Lane) -> None:
        if self._serve_lane is None:
            raise Unavailable(f"{self._report.worker_id} receives no KV: it is not a decode worker.")
        await self._serve_lane(lane)

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new; returns how many attempts were unfinished when all had ended or the time was up."""
        self._post(self._role.drain)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not (self._idle and self._report.state is WorkerState.DRAINING):
                    await self._changed.wait()
        report = self._report
        return 0 if self._idle else max(1, report.waiting + report.running, report.leases)
