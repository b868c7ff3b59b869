"""The destination's shell: joins the pure `DestinationMachine` to lanes, the worker's ranks and time."""

from __future__ import annotations

import asyncio
import logging

from ..core.clock import Clock
from ..core.errors import DiptychError
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
from .answers import Attached, Copied, DestinationAnswer, Fenced, NotAttached, PairBroken, Said
from .destination_machine import DestinationMachine
from .destination_rank import DestinationRank
from .events import DestinationEvents
from .geometry import SLOTS
from .lanes import Lane
from .performing import Performer
from .pool import Pool
from .ranks import DestinationOrder, DestinationRanks, Ranks
from .slices import routes

log = logging.getLogger(__name__)


class Destination:
    """Takes KV into this worker's pools; lives with rank 0, the leader. Methods are called on the asyncio thread; none blocks."""

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
        others: DestinationRanks = lambda answer: (),
    ) -> None:
        """Construct while the loop runs; close before the pool, which is rank 0's. `layout`: of all ranks. `transports`: those it may
        use, the best first. `host`: the address by which peers reach rank 0; gloo binds to its interface alone. `others`: makes the
        ranks from 1 on."""
        self._here = DestinationRank(0, pool, layout, host=host, silence_s=lease_s, answer=self._answered)
        self._ranks: Ranks[DestinationOrder] = Ranks([self._here, *others(self._answered)])
        hello = Hello(worker_id, incarnation, layout, self._ranks.endpoints, transports)
        self._machine = DestinationMachine(hello, lease_s, offer_wait_s, SLOTS)
        self._layout = layout
        self._clock = clock
        self._events = events
        self._lanes: dict[int, Lane] = {}
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
        assert self._here.lanes <= self._ranks.lanes <= self._lanes.keys(), "mappings and pairs go with their lane"

    async def serve_lane(self, lane: Lane) -> None:
        """Speak with one source until the lane ends; then everything on it has failed."""
        number = self._machine.lane_opened(self._clock.now())
        self._lanes[number] = lane
        self._alarm.set()
        reason = "this end failed"
        try:
            await lane.each(lambda message: self._do(self._machine.received(number, message, self._clock.now())))
            reason = "the source closed it"
        except DiptychError as error:
            reason = error.message
        finally:
            lane.close()
            self._do(self._machine.lane_broken(number, reason, self._clock.now()))
            del self._lanes[number]

    async def close(self) -> None:
        """Cancel everything, hang up all lanes; returns when no copy thread and no pair is left."""
        self._do(self._machine.close("The worker is closing.", self._clock.now()))
        while self._machine.transfers:
            self._idle.clear()
            await self._idle.wait()
        await self._ranks.close()
        self._alarm.cancel()

    def _expire(self) -> None:
        self._do(self._machine.expire(self._clock.now()))

    def _act(self, action: DestinationAction) -> None:
        match action:
            case Copy() | Receive() | Introduce():
                self._ranks.on(action.lane, action.route).carry_out(action)
            case Send(lane, message):
                self._lanes[lane].send(message)
            case Fence():
                self._ranks.all(action)
            case TellOffered(transfer_id, prompt_tokens):
                self._events.offered(transfer_id, prompt_tokens)
            case TellNearlyDone(transfer_id):
                self._events.nearly_done(transfer_id)
            case TellCommitted(transfer_id, first_tokens, kv_bytes, seconds, lacking):
                self._events.committed(transfer_id, first_tokens, kv_bytes, seconds, lacking)
            case TellFailed(transfer_id, error):
                self._events.failed(transfer_id, error)
            case TellReleased(transfer_id):
                self._events.released(transfer_id)
            case Attach(lane, hello) | Connect(lane, hello):
                self._ranks.open(lane, [route.destination for route in routes(hello.layout, self._layout)])
                self._ranks.all(action)
            case Detach():
                self._ranks.detach(action)
            case HangUp(lane, reason):
                log.info("lane %d closed: %s", lane, reason)
                self._lanes[lane].close()

    def _answered(self, answer: DestinationAnswer) -> None:
        machine, now = self._machine, self._clock.now()
        match answer:
            case Copied(transfer_id, seq, error):
                self._do(machine.copied(transfer_id, seq, error, now))
            case Fenced(transfer_id, rank):
                self._do(machine.fenced(transfer_id, now, rank))
                self._idle.set()
            case Attached(lane, rank):
                self._do(machine.attached(lane, now, rank))
            case NotAttached(lane, rank, message):
                self._do(machine.not_attached(lane, message, now, rank))
            case Said(lane, route, key, value):
                if lane in self._lanes:
                    self._lanes[lane].send(Rendezvous(route, key, value))
            case PairBroken(lane, reason):
                self._do(machine.pair_broken(lane, reason, now))
