"""A rank that does what its leader says: computes its part of every step, and carries out the orders of transfers on its pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from ..core.plain_json import to_json
from ..core.transfer import ShmEndpoint
from ..kv_transfer.order_codec import decode, encode
from ..kv_transfer.transports.rendezvous import ToldStore
from .channel import Channel, Connection, Died, Kind, pack_entry, unpack_entry
from .meeting import MEETING_S
from .outbox import Call
from .stepping import Part, StepEngine


class TransferRank(Protocol):
    """`SourceRank` or `DestinationRank`."""

    @property
    def endpoint(self) -> ShmEndpoint: ...
    def carry_out(self, order: Any) -> None: ...
    async def close(self) -> None: ...


class Follower:
    """Lives on the asyncio thread; its engine has a thread of its own. `died` ends the process: it is called when the leader is lost, or
    anything fails, since its worker would be out of step."""

    def __init__(self, connection: Connection, died: Died) -> None:
        self._died = died
        self._loop = asyncio.get_running_loop()
        self._steps: SimpleQueue[bytes | None] = SimpleQueue()
        self._over: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._rank: TransferRank | None = None
        self._closing: asyncio.Task[None] | None = None
        self._channel = Channel(connection, "rank 0", self._heard, died)
        self.store = ToldStore(lambda key, value: self._channel.send(Kind.STORE, pack_entry(key, value)), MEETING_S)
        """For `engine.parallel.connect`."""
        self._channel.start()

    async def serve(self, engine: StepEngine, make: Callable[[Callable[[Any], None]], TransferRank], *, draws: bool) -> bytes | None:
        """Say that this rank is ready; returns when the leader has said that its role is over, and every step is computed: the order by
        which it takes another, after which it is to serve again, or None if all is over. `make` makes its end of transfers from what takes
        its answers; `draws`: whether it is this rank that draws."""
        self._rank = make(lambda answer: self._channel.send(Kind.ANSWER, encode(answer)))
        computing = Thread(target=self._compute, args=(Part(engine, self._channel.send, draws=draws),), name="engine", daemon=True)
        computing.start()
        self._channel.send(Kind.READY, to_json(self._rank.endpoint))
        order = await self._over.get()
        await asyncio.to_thread(computing.join)
        return order

    def close(self) -> None:
        """When nothing is left of this rank: the leader ends too. Said before the process ends, since its threads, the one that pings among
        them, stop when Python begins to take it down, which takes seconds on a busy host."""
        self._channel.close()

    def _heard(self, kind: Kind, payload: bytes) -> None:
        """On the channel's thread."""
        match kind:
            case Kind.STEP:
                self._steps.put(payload)
            case Kind.ORDER:
                self._call_soon(partial(self._carry_out, payload))
            case Kind.STORE:
                self.store.heard(*unpack_entry(payload))
            case Kind.CLOSE:
                self._call_soon(self._close)
            case Kind.ROLE:
                self._end_role(payload)
            case Kind.END:
                self._channel.end()
                self._end_role(None)
            case _:
                raise ValueError(f"the leader has said {kind.name}, which a leader does not say")

    def _end_role(self, order: bytes | None) -> None:
        self._steps.put(None)
        self._call_soon(partial(self._over.put_nowait, order))

    def _compute(self, part: Part) -> None:
        try:
            while (payload := self._steps.get()) is not None:
                part.run(payload)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the ranks are out of step
            self._died(error)

    def _call_soon(self, call: Call) -> None:
        self._loop.call_soon_threadsafe(self._guarded, call)

    def _guarded(self, call: Call) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - asyncio would log it and go on
            self._died(error)

    def _carry_out(self, payload: bytes) -> None:
        assert self._rank is not None
        self._rank.carry_out(decode(payload))

    def _close(self) -> None:
        assert self._rank is not None
        self._closing = asyncio.create_task(self._rank.close())
        self._closing.add_done_callback(lambda task: self._guarded(partial(self._closed, task)))

    def _closed(self, task: asyncio.Task[None]) -> None:
        task.result()
        self._channel.send(Kind.CLOSED)
