"""What one rank of a destination does: maps the pools it copies from, copies, receives, and fences all of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..core.errors import TransferFailed
from ..core.layout import Layout
from ..core.transfer import Hello, ShmEndpoint
from .actions import Attach, Connect, Copy, Detach, Fence, Introduce, Receive
from .answers import Attached, Copied, DestinationAnswer, Fenced, NotAttached, PairBroken, Said
from .crossing import Crossing
from .pool import Pool
from .ranks import DestinationOrder
from .slices import routes
from .staging import slot_bytes
from .transports.gloo import Device, Ground, Incoming, PairEvents
from .transports.shm import PeerPool, ShmCopies, attach

log = logging.getLogger(__name__)


class DestinationRank:
    """`ranks.Rank` of a destination, over the rank's own pool. Every method is called on the asyncio thread and returns at once."""

    def __init__(
        self, rank: int, pool: Pool, layout: Layout, *, host: str, silence_s: float, answer: Callable[[DestinationAnswer], None]
    ) -> None:
        """Construct while the loop runs; close before the pool. `layout`: the worker's, all ranks. `host`: the address by which peers
        reach this rank; gloo binds to its interface alone. `silence_s`: how long a peer of a pair may be silent."""
        self._rank, self._pool, self._layout, self._answer = rank, pool, layout, answer
        self._device, self._silence_s = Device(host), silence_s
        self._copies = ShmCopies(pool, self._copied, self._fenced)
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
            case Attach(lane, hello):
                self._attaching[lane] = asyncio.create_task(self._attach(lane, hello), name=f"map the pools of {hello.worker_id}")
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
        self._device.close()
        self._copies.close()

    # -- one-sided ----------------------------------------------------------------------------------------------------

    async def _attach(self, lane: int, hello: Hello) -> None:
        mine = {number: route for number, route in enumerate(routes(hello.layout, self._layout)) if route.destination == self._rank}
        pools: dict[int, PeerPool] = {}
        try:
            for rank in sorted({route.source for route in mine.values()}):
                pools[rank] = await attach(hello.worker_id, hello.shm[rank], hello.layout.on(rank).layout)
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
        log.info("lane %d: KV comes from %s over shm", lane, hello.worker_id)
        self._answer(Attached(lane, self._rank))

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
        lane, hello = connect.lane, connect.hello
        log.info("lane %d: KV comes from %s over gloo%s", lane, hello.worker_id, connect.instead and f": {connect.instead}")
        self._pairs[lane] = {}
        for number, route in enumerate(routes(hello.layout, self._layout)):
            if route.destination != self._rank:
                continue
            crossing = Crossing(route, hello.layout, self._layout)
            ground = Ground(self._pool, self._device, crossing, slot_bytes(hello.layout), self._silence_s)
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
