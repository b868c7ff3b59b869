"""Recording all processes of a cluster of this host at once, by its router's control port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ...core.security import TlsFiles
from ...rpc.router import RouterClient
from ...rpc.spans import ClockSeen, SpansClient
from .taken import Process

MOST = 200_000
"""Spans of a process; 30 s of a decode worker have 30,000."""


class Collection:
    """Of a cluster whose router's control port is `control`."""

    def __init__(self, control: str, tls: TlsFiles | None) -> None:
        self._control, self._tls = control, tls
        self._under_way: list[tuple[str, str, SpansClient, ClockSeen]] = []
        self._clients: list[SpansClient] = []
        self.processes: tuple[Process, ...] = ()
        """What was recorded, once it has ended."""

    async def begin(self, seconds: float) -> None:
        """Returns when the router and every worker is recorded. Raises what the first one refuses with."""
        async with RouterClient(self._control, self._tls) as router:
            fleet, _ = await router.describe()
        asked = [("router", "router", self._client(self._control, router=True))]
        asked += [(member.worker_id, member.phase.value, self._client(member.address)) for member in fleet.members]
        seen = await asyncio.gather(*(client.begin(seconds, MOST) for _, _, client in asked))
        self._under_way = [(*each, clock) for each, clock in zip(asked, seen, strict=True)]

    async def end(self) -> None:
        """Take what there is, one after another: each answer costs the one that gives it some milliseconds."""
        found = []
        for name, phase, client, clock in self._under_way:
            found.append(Process(name, phase, clock.pid, clock.ahead, clock.unsure, await client.end()))
        self.processes = tuple(found)

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    def _client(self, address: str, *, router: bool = False) -> SpansClient:
        client = SpansClient(address, self._tls, router=router)
        self._clients.append(client)
        return client


@asynccontextmanager
async def recording(control: str, tls: TlsFiles | None, seconds: float) -> AsyncIterator[Collection]:
    """The router and every worker are recorded within, for `seconds` at most; `processes` are there behind it. Raises `DiptychError` if one
    of them cannot be reached, refuses, or ends meanwhile."""
    collection = Collection(control, tls)
    try:
        await collection.begin(seconds)
        yield collection
        await collection.end()
    finally:
        await collection.close()
