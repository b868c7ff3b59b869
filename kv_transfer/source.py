"""The source's shell: joins the pure `SourceMachine` to lanes, the worker's ranks and time."""

from __future__ import annotations

import asyncio
import logging

from ..core.clock import Clock
from ..core.errors import DiptychError
from ..core.layout import Layout
from ..core.request import Token
from ..core.transfer import Hello, Rendezvous, Transport
from ..rpc.lane import dial_lane
from .actions import (
    Connect,
    Detach,
    Dial,
    Fence,
    HangUp,
    Introduce,
    Send,
    SourceAction,
    Stage,
    TellFailed,
    TellGranted,
    TellHandedOver,
    TellReleased,
)
from .alarm import Alarm
from .answers import Connected, Fenced, PairBroken, Said, Sent, SourceAnswer, TurnedAway
from .events import SourceEvents
from .geometry import SLOTS
from .lanes import DialLane, Lane
from .performing import Performer
from .pool import Pool
from .ranks import Ranks, SourceOrder, SourceRanks
from .slices import routes
from .source_machine import WORTH_BYTES, SourceMachine
from .source_rank import SourceRank

log = logging.getLogger(__name__)

ANNOUNCE_EVERY_S = 0.001
"""What is stored within so long of an announcement is announced together with the next. A message costs each end 0.1 ms, whatever it
announces: as much as copying 1 MiB. A Commit announces what is left at once."""


class Source:
    """Hands KV over from this worker's pools; lives with rank 0, the leader. Methods are called on the asyncio thread; none blocks."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        pool: Pool,
        layout: Layout,
        clock: Clock,
        lease_s: float,
        events: SourceEvents,
        *,
        transports: tuple[Transport, ...],
        host: str,
        dial: DialLane = dial_lane,
        others: SourceRanks = lambda answer: (),
    ) -> None:
        """Construct while the loop runs; close before the pool, which is rank 0's. `layout`: of all ranks. `transports`: those it may
        use. `host`: the address by which peers reach rank 0; gloo binds to its interface alone. `dial`: a test's own way to open lanes.
        `others`: makes the ranks from 1 on."""
        self._here = SourceRank(0, pool, layout, host=host, silence_s=lease_s, answer=self._answered)
        self._ranks: Ranks[SourceOrder] = Ranks([self._here, *others(self._answered)])
        self._machine = SourceMachine(Hello(worker_id, incarnation, layout, self._ranks.endpoints, transports), lease_s, SLOTS)
        self._layout = layout
        self._clock = clock
        self._events = events
        self._dial = dial
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._announcing: asyncio.Handle | None = None
        self._announced_at = 0.0
        self._idle = asyncio.Event()
        self._alarm = Alarm(clock, self._machine.next_deadline, self._expire)
        self._do = Performer(self._act, self._alarm.set).do

    def offer(self, transfer_id: str, destination_address: str, prompt_tokens: int) -> None:
        """Open a transfer of a prompt whose every block is owned. Raises `InvalidRequest` if the id is under way already."""
        self._do(self._machine.offer(transfer_id, destination_address, prompt_tokens, self._clock.now()))

    def computed(
        self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: tuple[tuple[int, ...], ...], rank: int = 0
    ) -> None:
        """KV of positions [start, stop) of `layers`, which `rank` holds, is stored there. Per layer, positions come in order and without
        holes; before or after the Grant. `tables` as in `engine.batch.Row`: `tables[g][i]` holds positions
        [i*block_size, (i+1)*block_size). What is computed in one turn of the loop, or within `ANNOUNCE_EVERY_S`, is announced together.
        Unknown (ended) ids are ignored. Raises `Internal` if positions come out of order."""
        if self._machine.computed(transfer_id, layers, start, stop, tables, rank) and self._announcing is None:
            due = self._announced_at + ANNOUNCE_EVERY_S
            soon = due <= self._loop.time()
            self._announcing = self._loop.call_soon(self._announce) if soon else self._loop.call_at(due, self._announce)

    def together(self, positions: int) -> int:
        """How many layers of so many positions of one prompt are worth a message, roughly: `computed` need not be told of fewer, but for
        the last ones. From any thread."""
        layer_bytes = self._layout.on(0).layout.groups[0].token_bytes
        return -(-WORTH_BYTES // (positions * layer_bytes))

    def commit(self, transfer_id: str, first_tokens: tuple[Token, ...]) -> None:
        """All positions of all layers were `computed` on every rank (else `Internal`), and these are the first tokens. Unknown (ended)
        ids are ignored."""
        self._do(self._machine.commit(transfer_id, first_tokens, self._clock.now()))

    def cancel(self, transfer_id: str, reason: str) -> None:
        """Give the transfer up: `failed` with `Cancelled` and `released` come at once. Unknown (ended) ids are ignored."""
        self._do(self._machine.cancel(transfer_id, reason, self._clock.now()))

    @property
    def leases(self) -> int:
        """Transfers offered and not yet released."""
        return self._machine.transfers

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        self._machine.check()
        assert self._lanes.keys() <= self._tasks.keys(), "a lane is one task's"
        assert self._here.lanes <= self._ranks.lanes <= self._lanes.keys(), "a pair goes with its lane"

    async def close(self) -> None:
        """Cancel everything, hang up all lanes; returns when no task of it is left."""
        self._do(self._machine.close("The worker is closing.", self._clock.now()))
        while self._machine.transfers:
            self._idle.clear()
            await self._idle.wait()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        await self._ranks.close()
        self._alarm.cancel()
        if self._announcing is not None:
            self._announcing.cancel()

    def _announce(self) -> None:
        self._announcing, self._announced_at = None, self._loop.time()
        self._do(self._machine.announce(self._clock.now()))

    def _expire(self) -> None:
        self._do(self._machine.expire(self._clock.now()))

    def _act(self, action: SourceAction) -> None:
        match action:
            case Send(lane, message):
                self._lanes[lane].send(message)
            case Fence():
                self._ranks.all(action)
            case TellGranted(transfer_id):
                self._events.granted(transfer_id)
            case TellHandedOver(transfer_id, kv_bytes, seconds, transport):
                self._events.handed_over(transfer_id, kv_bytes, seconds, transport)
            case TellFailed(transfer_id, error):
                self._events.failed(transfer_id, error)
            case TellReleased(transfer_id):
                self._events.released(transfer_id)
            case Dial(lane, address):
                self._tasks[lane] = asyncio.create_task(self._speak(lane, address), name=f"lane to {address}")
                self._tasks[lane].add_done_callback(lambda _: self._tasks.pop(lane))
            case HangUp(lane, reason):
                self._hang_up(lane, reason)
            case Stage() | Introduce():
                self._ranks.on(action.lane, action.route).carry_out(action)
            case Connect(lane, hello):
                self._ranks.open(lane, [route.source for route in routes(self._layout, hello.layout)])
                self._ranks.all(action)
            case Detach():
                self._ranks.detach(action)

    def _answered(self, answer: SourceAnswer) -> None:
        machine, now = self._machine, self._clock.now()
        match answer:
            case Sent(lane, route, count):
                self._do(machine.sent(lane, count, now, route))
            case Fenced(transfer_id, rank):
                self._do(machine.fenced(transfer_id, now, rank))
                self._idle.set()
            case Said(lane, route, key, value):
                if lane in self._lanes:
                    self._lanes[lane].send(Rendezvous(route, key, value))
            case Connected(lane, route):
                self._do(machine.connected(lane, now, route))
            case PairBroken(lane, reason):
                self._do(machine.pair_broken(lane, reason, now))
            case TurnedAway():
                self._events.turned_away()

    def _hang_up(self, lane: int, reason: str) -> None:
        log.info("lane %d closed: %s", lane, reason)
        if lane in self._lanes:
            self._lanes[lane].close()
        elif lane in self._tasks:
            self._tasks[lane].cancel()

    async def _speak(self, number: int, address: str) -> None:
        """Dial, and take the peer's messages until the lane ends."""
        reason = "this end failed"
        try:
            lane = self._lanes[number] = await self._dial(address)
            self._do(self._machine.dialled(number, self._clock.now()))
            await lane.each(lambda message: self._do(self._machine.received(number, message, self._clock.now())))
            reason = "the destination closed it"
        except DiptychError as error:
            reason = error.message
        finally:
            if number in self._lanes:
                self._lanes.pop(number).close()
            self._do(self._machine.lane_broken(number, reason, self._clock.now()))
