"""The destination's shell: joins the pure `DestinationMachine` to lanes, the copy thread and time."""

from __future__ import annotations

import asyncio
import logging

from ..core.clock import Clock
from ..core.errors import DiptychError, TransferFailed
from ..core.layout import Layout
from ..core.transfer import GroupGrant, Hello, RefusedReason, Rendezvous, Transport
from .actions import (
    Attach,
    Connect,
    Copy,
    DestinationAction,
    Detach,
    Fence,
    HangUp,
    Introduce,
    Receive,
    Send,
    TellCommitted,
    TellFailed,
    TellNearlyDone,
    TellOffered,
    TellReleased,
)
from .alarm import Alarm
from .destination_machine import DestinationMachine
from .events import DestinationEvents
from .geometry import SLOTS
from .lanes import Lane
from .performing import Performer
from .pool import Pool
from .transports.gloo import Device, Incoming, PairEvents
from .transports.shm import PeerPool, ShmCopies, attach

log = logging.getLogger(__name__)


class Destination:
    """Takes KV into this worker's pool. Every method is called on the asyncio thread and returns at once."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        pool: Pool,
        layout: Layout,
        clock: Clock,
        lease_s: float,
        offer_wait_s: float,
        events: DestinationEvents,
        *,
        transports: tuple[Transport, ...],
        host: str,
    ) -> None:
        """Construct while the loop runs; close before the pool. `transports`: those it may use, the best first. `host`: the address by
        which peers reach this worker; gloo binds to its interface alone."""
        hello = Hello(worker_id, incarnation, layout, pool.endpoint, transports)
        self._machine = DestinationMachine(hello, lease_s, offer_wait_s, SLOTS)
        self._pool = pool
        self._lease_s = lease_s
        self._device = Device(host)
        self._pairs: dict[int, Incoming] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._clock = clock
        self._events = events
        self._copies = ShmCopies(pool, self._copied, self._fenced)
        self._lanes: dict[int, Lane] = {}
        self._sources: dict[int, PeerPool] = {}
        self._attaching: dict[int, asyncio.Task[None]] = {}
        self._idle = asyncio.Event()
        self._alarm = Alarm(clock, self._machine.next_deadline, self._expire)
        self._do = Performer(self._act, self._alarm.set).do

    def expect(self, transfer_id: str) -> None:
        """A Decode has come; its Offer may already be parked. An id that was used before fails at once. Raises `InvalidRequest` if
        a transfer of this id is under way."""
        self._do(self._machine.expect(transfer_id, self._clock.now()))

    def grant(self, transfer_id: str, groups: tuple[GroupGrant, ...]) -> None:
        """Give blocks to an offered transfer, one `GroupGrant` per cache group. Ignored if it has ended meanwhile (then `released`
        was or will be called, and nothing touches the blocks). Raises `Internal` if the blocks cannot hold the prompt."""
        self._do(self._machine.grant(transfer_id, groups, self._clock.now()))

    def refuse(self, transfer_id: str, reason: RefusedReason, message: str) -> None:
        """Turn an offered transfer down; `failed` with `message` and `released` come at once. Ignored if it has ended."""
        self._do(self._machine.refuse(transfer_id, reason, message, self._clock.now()))

    def cancel(self, transfer_id: str) -> None:
        """Give the transfer up: `failed` with `Cancelled` at once, `released` when no copy runs any more. Unknown ids are ignored."""
        self._do(self._machine.cancel(transfer_id, "The destination has cancelled the transfer.", self._clock.now()))

    @property
    def leases(self) -> int:
        """Transfers that hold granted blocks: granted and neither committed nor released."""
        return self._machine.leases

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        self._machine.check()
        assert self._sources.keys() <= self._lanes.keys(), "a mapping goes with its lane"
        assert self._pairs.keys() <= self._lanes.keys(), "and so does a pair"

    async def serve_lane(self, lane: Lane) -> None:
        """Speak with one source until the lane ends; then everything on it has failed."""
        number = self._machine.lane_opened(self._clock.now())
        self._lanes[number] = lane
        self._alarm.set()
        reason = "this end failed"
        try:
            async for message in lane:
                self._do(self._machine.received(number, message, self._clock.now()))
            reason = "the source closed it"
        except DiptychError as error:
            reason = error.message
        finally:
            lane.close()
            self._do(self._machine.lane_broken(number, reason, self._clock.now()))
            del self._lanes[number]

    async def close(self) -> None:
        """Cancel everything, hang up all lanes; returns when the copy thread has ended."""
        self._do(self._machine.close("The worker is closing.", self._clock.now()))
        while self._machine.transfers:
            self._idle.clear()
            await self._idle.wait()
        if self._attaching:
            await asyncio.wait(list(self._attaching.values()))
        if self._closing:
            await asyncio.wait(self._closing)
        self._device.close()
        self._copies.close()
        self._alarm.cancel()

    def _copied(self, transfer_id: str, seq: int, error: str | None) -> None:
        self._do(self._machine.copied(transfer_id, seq, error, self._clock.now()))

    def _fenced(self, transfer_id: str) -> None:
        self._do(self._machine.fenced(transfer_id, self._clock.now()))
        self._idle.set()

    def _expire(self) -> None:
        self._do(self._machine.expire(self._clock.now()))

    def _act(self, action: DestinationAction) -> None:
        match action:
            case Copy():
                self._copies.copy(self._sources[action.lane], action)
            case Send(lane, message):
                self._lanes[lane].send(message)
            case Receive():
                self._pairs[action.lane].receive(action)
            case Fence(transfer_id):
                self._copying(action.lane).fence(transfer_id)
            case TellOffered(transfer_id, prompt_tokens):
                self._events.offered(transfer_id, prompt_tokens)
            case TellNearlyDone(transfer_id):
                self._events.nearly_done(transfer_id)
            case TellCommitted(transfer_id, first_tokens, kv_bytes, seconds):
                self._events.committed(transfer_id, first_tokens, kv_bytes, seconds)
            case TellFailed(transfer_id, error):
                self._events.failed(transfer_id, error)
            case TellReleased(transfer_id):
                self._events.released(transfer_id)
            case Attach(lane, hello):
                self._attaching[lane] = asyncio.create_task(self._attach(lane, hello), name=f"map the pool of {hello.worker_id}")
                self._attaching[lane].add_done_callback(lambda _: self._attaching.pop(lane))
            case Connect():
                self._connect(action)
            case Introduce(lane, key, value):
                self._pairs[lane].introduce(key, value)
            case Detach(lane):
                self._detach(lane)
            case HangUp(lane, reason):
                log.info("lane %d closed: %s", lane, reason)
                self._lanes[lane].close()

    async def _attach(self, lane: int, hello: Hello) -> None:
        assert hello.shm is not None
        try:
            self._sources[lane] = await attach(hello.worker_id, hello.shm, hello.layout)
        except TransferFailed as error:
            actions = self._machine.not_attached(lane, error.message, self._clock.now())
        else:
            log.info("lane %d: KV comes from %s over shm", lane, hello.worker_id)
            actions = self._machine.attached(lane, self._clock.now())
        self._do(actions)

    def _copying(self, lane: int) -> ShmCopies | Incoming:
        """Who writes what comes on `lane`."""
        return self._pairs.get(lane, self._copies)

    def _connect(self, connect: Connect) -> None:
        number, lane = connect.lane, self._lanes[connect.lane]
        log.info("lane %d: KV comes from %s over gloo%s", number, connect.hello.worker_id, connect.instead and f": {connect.instead}")
        events = PairEvents(
            broken=lambda reason: self._do(self._machine.pair_broken(number, reason, self._clock.now())),
            copied=self._copied,
            fenced=self._fenced,
        )
        tell = lambda key, value: lane.send(Rendezvous(key, value))  # noqa: E731
        self._pairs[number] = Incoming(self._pool, self._device, self._lease_s, tell, events)

    def _detach(self, lane: int) -> None:
        if lane in self._pairs:
            pair = self._pairs.pop(lane)
            pair.close()
            task = asyncio.create_task(pair.wait_closed())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        elif lane in self._sources:
            self._copies.detach(self._sources.pop(lane))
        elif lane in self._attaching:
            self._attaching[lane].cancel()
