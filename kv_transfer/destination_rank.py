"""What one rank of a destination does: maps the pools it copies from, copies, receives, and fences all of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..core.errors import TransferFailed
from ..core.layout import Layout
from ..core.transfer import Hello, ShmEndpoint, Transport
from .actions import Attach, Connect, Copy, Detach, Fence, Introduce, Receive
from .answers import Attached, Copied, DestinationAnswer, Fenced, NotAttached, PairBroken, Said
from .crossing import Crossing
from .pool import Pool
from .ranks import DestinationOrder
from .slices import routes
from .staging import slot_bytes
from .transports import cuda_ipc, shm
from .transports.copy_thread import Copies
from .transports.one_sided import PeerPool
from .transports.two_sided import Ground, Incoming, PairEvents
from .transports.wiring import wires_at

log = logging.getLogger(__name__)


class DestinationRank:
    """`ranks.Rank` of a destination, over the rank's own pool. Every method is called on the asyncio thread and returns at once."""

    def __init__(
        self, rank: int, pool: Pool, layout: Layout, *, host: str, silence_s: float, answer: Callable[[DestinationAnswer], None]
    ) -> None:
        """Construct while the loop runs; close before the pool. `layout`: the worker's, all ranks. `host`: the address by which peers
        reach this rank; gloo binds to its interface alone. `silence_s`: how long a peer of a pair may be silent."""
        self._rank, self._pool, self._layout, self._answer = rank, pool, layout, answer
        self._wires, self._silence_s = wires_at(host, pool.device), silence_s
        self._copies = Copies(pool, self._copied, self._fenced)
        self._sources: dict[int, dict[int, PeerPool]] = {}
        """The pools mapped for a lane, by the source's rank."""
        self._ways: dict[tuple[int, int], tuple[PeerPool, Crossing]] = {}
        """What is copied along a lane's route."""
        self._attaching: dict[int, asyncio.Task[None]] = {}
        self._pairs: dict[int, dict[int, Incoming]] = {}
        self._fencing: dict[str, int] = {}
        """How many pairs have still to answer."""
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> ShmEndpoint:
        return self._pool.endpoint

    @property
    def lanes(self) -> set[int]:
        """Those that have mappings or pairs here."""
        return {*self._sources, *self._pairs}

    def carry_out(self, order: DestinationOrder) -> None:
        match order:
            case Copy():
                self._copies.copy(*self._ways[order.lane, order.route], order)
            case Receive():
                self._pairs[order.lane][order.route].receive(order)
            case Fence(transfer_id):
                self._fence(transfer_id, order.lane)
            case Attach(lane, hello, transport):
                self._attaching[lane] = asyncio.create_task(
                    self._attach(lane, hello, transport), name=f"map the pools of {hello.worker_id}"
                )
                self._attaching[lane].add_done_callback(lambda _: self._attaching.pop(lane))
            case Connect():
                self._unmap(order.lane)
                self._connect(order)
            case Introduce(lane, route, key, value):
                self._pairs[lane][route].introduce(key, value)
            case Detach(lane):
                self._unmap(lane)
                for pair in self._pairs.pop(lane, {}).values():
                    self._disconnect(pair)

    async def close(self) -> None:
        """When every lane is detached and every fence answered: returns when the copy thread has ended and no pair is left."""
        if self._attaching:
            await asyncio.wait(list(self._attaching.values()))
        if self._closing:
            await asyncio.wait(self._closing)
        for wires in self._wires.values():
            wires.close()
        self._copies.close()

    # -- one-sided ----------------------------------------------------------------------------------------------------

    async def _attach(self, lane: int, hello: Hello, transport: Transport) -> None:
        mine = {number: route for number, route in enumerate(routes(hello.layout, self._layout)) if route.destination == self._rank}
        pools: dict[int, PeerPool] = {}
        try:
            for rank in sorted({route.source for route in mine.values()}):
                pools[rank] = await self._map(hello, rank, transport)
        except BaseException as error:
            for pool in pools.values():
                pool.close()
            if not isinstance(error, TransferFailed):
                raise
            self._answer(NotAttached(lane, self._rank, error.message))
            return
        self._sources[lane] = pools
        for number, route in mine.items():
            self._ways[lane, number] = pools[route.source], Crossing(route, hello.layout, self._layout)
        log.info("lane %d: KV comes from %s over %s", lane, hello.worker_id, transport)
        self._answer(Attached(lane, self._rank))

    async def _map(self, hello: Hello, rank: int, transport: Transport) -> PeerPool:
        layout = hello.layout.on(rank).layout
        if transport is Transport.SHM:
            return await shm.attach(hello.worker_id, hello.shm[rank], layout)
        return await cuda_ipc.attach(hello.worker_id, hello.shm[rank], layout, self._pool.device, self._silence_s)

    def _unmap(self, lane: int) -> None:
        if lane in self._attaching:
            self._attaching[lane].cancel()
        for pool in self._sources.pop(lane, {}).values():
            self._copies.detach(pool)
        for way in [way for way in self._ways if way[0] == lane]:
            del self._ways[way]

    def _copied(self, transfer_id: str, seq: int, error: str | None) -> None:
        self._answer(Copied(transfer_id, seq, error))

    # -- two-sided ----------------------------------------------------------------------------------------------------

    def _connect(self, connect: Connect) -> None:
        lane, hello, transport = connect.lane, connect.hello, connect.transport
        log.info("lane %d: KV comes from %s over %s%s", lane, hello.worker_id, transport, connect.instead and f": {connect.instead}")
        self._pairs[lane] = {}
        for number, route in enumerate(routes(hello.layout, self._layout)):
            if route.destination != self._rank:
                continue
            crossing = Crossing(route, hello.layout, self._layout)
            ground = Ground(self._pool, transport, self._wires[transport], crossing, slot_bytes(hello.layout), self._silence_s)
            self._pairs[lane][number] = Incoming(ground, self._events(lane, number))

    def _events(self, lane: int, route: int) -> PairEvents:
        return PairEvents(
            broken=lambda reason: self._answer(PairBroken(lane, reason)),
            say=lambda key, value: self._answer(Said(lane, route, key, value)),
            copied=self._copied,
            fenced=self._fenced_one,
        )

    def _disconnect(self, pair: Incoming) -> None:
        pair.close()
        task = asyncio.create_task(pair.wait_closed())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _fence(self, transfer_id: str, lane: int) -> None:
        if lane not in self._pairs:
            self._copies.fence(transfer_id)
            return
        self._fencing[transfer_id] = len(self._pairs[lane]) + 1
        for pair in self._pairs[lane].values():
            pair.fence(transfer_id)
        self._fenced_one(transfer_id)

    def _fenced_one(self, transfer_id: str) -> None:
        self._fencing[transfer_id] -= 1
        if not self._fencing[transfer_id]:
            del self._fencing[transfer_id]
            self._fenced(transfer_id)

    def _fenced(self, transfer_id: str) -> None:
        self._answer(Fenced(transfer_id, self._rank))
