"""What one rank of a source does: sets epoch words, hands its pool out, stages and sends the pieces of its routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ..core.layout import Layout
from ..core.transfer import ShmEndpoint
from .actions import Connect, Detach, Fence, Introduce, Stage
from .answers import Connected, Fenced, PairBroken, Said, Sent, SourceAnswer, TurnedAway
from .crossing import Crossing
from .pool import Pool
from .ranks import SourceOrder
from .slices import routes
from .staging import slot_bytes
from .transports.two_sided import Ground, Outgoing, PairEvents
from .transports.wiring import wires_at


class SourceRank:
    """`ranks.Rank` of a source, over the rank's own pool. Every method is called on the asyncio thread and returns at once."""

    def __init__(
        self, rank: int, pool: Pool, layout: Layout, *, host: str, silence_s: float, answer: Callable[[SourceAnswer], None]
    ) -> None:
        """Construct while the loop runs; close before the pool. `layout`: the worker's, all ranks. `host`: the address by which peers
        reach this rank; gloo binds to its interface alone. `silence_s`: how long a peer of a pair may be silent."""
        self._rank, self._pool, self._layout, self._answer = rank, pool, layout, answer
        self._wires, self._silence_s = wires_at(host, pool.device), silence_s
        self._pairs: dict[tuple[int, int], Outgoing] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pool.listener, pool.hand_out, lambda: answer(TurnedAway()))

    @property
    def endpoint(self) -> ShmEndpoint:
        return self._pool.endpoint

    @property
    def lanes(self) -> set[int]:
        """Those that have pairs here."""
        return {lane for lane, _ in self._pairs}

    def carry_out(self, order: SourceOrder) -> None:
        match order:
            case Fence(transfer_id, slot, word):
                # Copies made after this store are not counted, so nothing is to be waited for.
                self._pool.set_word(slot, word)
                self._answer(Fenced(transfer_id, self._rank))
            case Stage():
                self._pairs[order.lane, order.route].stage(order)
            case Connect():
                self._connect(order)
            case Introduce(lane, route, key, value):
                self._pairs[lane, route].introduce(key, value)
            case Detach(lane):
                for of in [of for of in self._pairs if of[0] == lane]:
                    self._disconnect(self._pairs.pop(of))

    async def close(self) -> None:
        """When every lane is detached: returns when no pair is left."""
        self._loop.remove_reader(self._pool.listener)
        if self._closing:
            await asyncio.wait(self._closing)
        for wires in self._wires.values():
            wires.close()

    def _connect(self, connect: Connect) -> None:
        lane, peer, transport = connect.lane, connect.hello.layout, connect.transport
        for number, route in enumerate(routes(self._layout, peer)):
            if route.source != self._rank:
                continue
            crossing = Crossing(route, self._layout, peer)
            ground = Ground(self._pool, transport, self._wires[transport], crossing, slot_bytes(self._layout), self._silence_s)
            self._pairs[lane, number] = Outgoing(ground, self._events(lane, number))

    def _events(self, lane: int, route: int) -> PairEvents:
        def tell(make: Callable[..., SourceAnswer], *arguments: object) -> None:
            self._answer(make(*arguments))

        return PairEvents(
            broken=partial(tell, PairBroken, lane),
            say=partial(tell, Said, lane, route),
            connected=partial(tell, Connected, lane, route),
            sent=partial(tell, Sent, lane, route),
        )

    def _disconnect(self, pair: Outgoing) -> None:
        pair.close()
        task = asyncio.create_task(pair.wait_closed())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
