"""Two machines, a wire, two memories and a clock, all in one thread: every step of a transfer happens when a test says so.

Memory is a table: (layer, block, row) → what was written there. A worker's blocks are overwritten as soon as they are released,
so a copy that should not count brings rubbish. The copy has two halves with anything in between.

Over gloo a pair is a queue of what was posted: the destination receives in the order of the announcements, and it must be just that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.request import Token
from diptych.core.transfer import GroupGrant, Hello, RefusedReason, ShmEndpoint, Transport
from diptych.kv_transfer.actions import (
    Attach,
    Connect,
    Copy,
    Detach,
    Dial,
    Fence,
    HangUp,
    Post,
    Receive,
    Send,
    Stage,
    TellCommitted,
    TellFailed,
    TellGranted,
    TellHandedOver,
    TellNearlyDone,
    TellOffered,
    TellReleased,
)
from diptych.kv_transfer.coverage import Span
from diptych.kv_transfer.destination_machine import DestinationMachine
from diptych.kv_transfer.source_machine import SourceMachine

LEASE_S = 10.0
OFFER_WAIT_S = 5.0
SLOTS = 6
BLOCK = 4
GROUPS = (
    CacheGroup(CacheKind.FULL, layers=(0, 3), kv_heads=1, head_dim=2, dtype=DType.FLOAT32),
    CacheGroup(CacheKind.WINDOW, layers=(1, 2, 4), kv_heads=1, head_dim=2, dtype=DType.FLOAT32, window=9),
)
LAYOUT = Layout("model", GROUPS, BLOCK, num_blocks=(40, 40))
LAYERS = (0, 1, 2, 3, 4)
FIRST_TOKENS = (Token(0, 7),)


SHM, GLOO = (Transport.SHM,), (Transport.GLOO,)


def hello(worker_id: str, incarnation: int, layout: Layout = LAYOUT, transports: tuple[Transport, ...] = SHM) -> Hello:
    return Hello(worker_id, incarnation, layout, ShmEndpoint("socket", b"n" * 16), transports)


class Memory:
    """Free blocks per group, the transfer each block is lent to, and rows."""

    def __init__(self) -> None:
        self.free = [list(range(count)) for count in LAYOUT.num_blocks]
        self.lent: dict[tuple[int, int], str] = {}
        self.rows: dict[tuple[int, int, int], Any] = {}

    def take(self, group: int, count: int, transfer_id: str) -> tuple[int, ...] | None:
        if len(self.free[group]) < count:
            return None
        blocks = tuple(self.free[group].pop(0) for _ in range(count))
        self.lent.update({(group, block): transfer_id for block in blocks})
        return blocks

    def give_back(self, transfer_id: str) -> None:
        for group, block in [key for key, owner in self.lent.items() if owner == transfer_id]:
            del self.lent[group, block]
            self.free[group].append(block)
            for layer in GROUPS[group].layers:
                for row in range(BLOCK):
                    self.rows[layer, block, row] = "rubbish"


Parcel = tuple[Span, dict[tuple[int, int], Any], int]
"""A piece in a staging slot: its span, (layer, position) → row, its checksum."""


@dataclass
class Wire:
    """One lane. Each end has its own number for it, and learns of its end for itself."""

    source_lane: int
    destination_lane: int | None = None
    to_source: deque[Any] = field(default_factory=deque)
    to_destination: deque[Any] = field(default_factory=deque)
    pair: deque[tuple[int, Parcel]] = field(default_factory=deque)
    """Posted by the source and not received: the staging slot, and what is in it."""
    source_open: bool = True
    destination_open: bool = True
    broken: bool = False


class Prompt:
    """What the source's worker has of one prompt: its blocks, and how far the layers have come."""

    def __init__(self, transfer_id: str, tokens: int, tables: tuple[tuple[int, ...], ...]) -> None:
        self.transfer_id = transfer_id
        self.tokens = tokens
        self.tables = tables
        self.stored = dict.fromkeys(LAYERS, 0)
        self.committed = False


class SourceSide:
    def __init__(self, incarnation: int, transports: tuple[Transport, ...]) -> None:
        self.machine = SourceMachine(hello("P", incarnation, transports=transports), LEASE_S, SLOTS)
        self.connecting: list[int] = []
        self.staging: deque[Stage] = deque()
        self.slots: dict[tuple[int, int], Parcel] = {}
        self.memory = Memory()
        self.words = dict.fromkeys(range(SLOTS), 0)
        self.prompts: dict[str, Prompt] = {}
        self.told: dict[str, list[str]] = {}


class DestinationSide:
    def __init__(self, incarnation: int, transports: tuple[Transport, ...]) -> None:
        self.machine = DestinationMachine(hello("D", incarnation, transports=transports), LEASE_S, OFFER_WAIT_S, SLOTS)
        self.memory = Memory()
        self.receives: dict[int, deque[Receive]] = {}
        self.given_up: set[str] = set()
        self.jobs: deque[Copy | Fence | Detach] = deque()
        self.half_done: Copy | None = None
        self.attaching: list[int] = []
        self.mapped: dict[int, SourceSide] = {}
        self.waiting: dict[str, int] = {}
        self.nearly_done: set[str] = set()
        self.granted: dict[str, tuple[GroupGrant, ...]] = {}
        self.told: dict[str, list[str]] = {}
        self.expected: list[str] = []


class World:
    def __init__(self, transports: tuple[Transport, ...] = SHM) -> None:
        self.now = 0.0
        self.transports = transports
        self.incarnations = 2
        self.source = SourceSide(1, transports)
        self.destination = DestinationSide(2, transports)
        self.wires: list[Wire] = []
        self.dialling: list[Wire] = []
        self.committed: list[str] = []

    # -- what the workers do ------------------------------------------------------------------------------------------

    def offer(self, transfer_id: str, tokens: int) -> None:
        source = self.source
        tables = [source.memory.take(group, -(-tokens // BLOCK), transfer_id) for group in range(len(GROUPS))]
        if None in tables:
            source.memory.give_back(transfer_id)
            return
        source.prompts[transfer_id] = Prompt(transfer_id, tokens, tuple(table for table in tables if table is not None))
        source.told[transfer_id] = []
        self.at_source(source.machine.offer(transfer_id, "D:1", tokens, self.now))

    def compute(self, transfer_id: str, layers: tuple[int, ...], count: int) -> None:
        """Store KV of the next `count` positions of `layers` (those that stand where the first of them stands)."""
        prompt = self.source.prompts[transfer_id]
        start = prompt.stored[layers[0]]
        layers = tuple(layer for layer in layers if prompt.stored[layer] == start)
        stop = min(start + count, prompt.tokens)
        for layer in layers:
            group = next(number for number, group in enumerate(GROUPS) if layer in group.layers)
            for position in range(start, stop):
                block = prompt.tables[group][position // BLOCK]
                self.source.memory.rows[layer, block, position % BLOCK] = (transfer_id, layer, position)
            prompt.stored[layer] = stop
        self.source.machine.computed(transfer_id, layers, start, stop, prompt.tables)

    def announce(self) -> None:
        self.at_source(self.source.machine.announce(self.now))

    def commit(self, transfer_id: str) -> None:
        prompt = self.source.prompts[transfer_id]
        if not prompt.committed and set(prompt.stored.values()) == {prompt.tokens}:
            prompt.committed = True
            self.at_source(self.source.machine.commit(transfer_id, FIRST_TOKENS, self.now))

    def cancel_at_source(self, transfer_id: str) -> None:
        self.at_source(self.source.machine.cancel(transfer_id, "P's router went away", self.now))

    def expect(self, transfer_id: str) -> None:
        self.destination.told[transfer_id] = []
        self.at_destination(self.destination.machine.expect(transfer_id, self.now))

    def grant(self, transfer_id: str, cached_blocks: int = 0) -> bool:
        """Give blocks for all but `cached_blocks` whole blocks of prefix; False if memory is short."""
        tokens = self.destination.waiting[transfer_id]
        groups = []
        for number, group in enumerate(GROUPS):
            first = min(cached_blocks, tokens // BLOCK) * BLOCK
            first = max(first, group.first_needed(tokens) // BLOCK * BLOCK)
            blocks = self.destination.memory.take(number, -(-(tokens - first) // BLOCK), transfer_id)
            if blocks is None:
                self.destination.memory.give_back(transfer_id)
                return False
            groups.append(GroupGrant(first, blocks))
        del self.destination.waiting[transfer_id]
        self.destination.granted[transfer_id] = tuple(groups)
        self.at_destination(self.destination.machine.grant(transfer_id, tuple(groups), self.now))
        return True

    def refuse(self, transfer_id: str) -> None:
        self.at_destination(self.destination.machine.refuse(transfer_id, RefusedReason.NO_MEMORY, "It can never fit.", self.now))

    def cancel_at_destination(self, transfer_id: str) -> None:
        self.at_destination(self.destination.machine.cancel(transfer_id, "D's router went away", self.now))

    # -- what the world does ------------------------------------------------------------------------------------------

    def dial(self, wire: Wire, *, well: bool = True) -> None:
        self.dialling.remove(wire)
        if not wire.source_open:
            return
        if not well:
            wire.source_open = False
            self.at_source(self.source.machine.lane_broken(wire.source_lane, "nobody answers", self.now))
            return
        wire.destination_lane = self.destination.machine.lane_opened(self.now)
        self.wires.append(wire)
        self.at_source(self.source.machine.dialled(wire.source_lane, self.now))

    def attach(self, lane: int, *, well: bool = True) -> None:
        self.destination.attaching.remove(lane)
        if well:
            self.destination.mapped[lane] = self.source
            self.at_destination(self.destination.machine.attached(lane, self.now))
        else:
            self.at_destination(self.destination.machine.not_attached(lane, "no shared memory", self.now))

    def deliver(self, wire: Wire, *, to_source: bool) -> bool:
        """The next message, or the news that there will be none; False if there is nothing to learn."""
        queue, is_open = (wire.to_source, wire.source_open) if to_source else (wire.to_destination, wire.destination_open)
        if not is_open:
            return False
        if queue:
            message = queue.popleft()
            if to_source:
                self.at_source(self.source.machine.received(wire.source_lane, message, self.now))
            else:
                assert wire.destination_lane is not None
                self.at_destination(self.destination.machine.received(wire.destination_lane, message, self.now))
            return True
        if wire.broken:
            if to_source:
                wire.source_open = False
                self.at_source(self.source.machine.lane_broken(wire.source_lane, "it broke", self.now))
            else:
                wire.destination_open = False
                assert wire.destination_lane is not None
                self.at_destination(self.destination.machine.lane_broken(wire.destination_lane, "it broke", self.now))
            return True
        return False

    def cut(self, wire: Wire, *, lose: bool) -> None:
        """The lane breaks; `lose`: with all that is under way."""
        wire.broken = True
        if lose:
            wire.to_source.clear()
            wire.to_destination.clear()

    def copy_step(self) -> bool:
        """The copy thread does half a copy, or one other thing; False if it has nothing to do."""
        side = self.destination
        if side.half_done is not None:
            copy, side.half_done = side.half_done, None
            self._copy_rows(copy, 1)
            stands = side.mapped[copy.lane].words[copy.slot] == copy.word
            error = None if stands else "The source took its blocks back."
            self.at_destination(side.machine.copied(copy.transfer_id, copy.seq, error, self.now))
            return True
        if not side.jobs:
            return False
        job = side.jobs.popleft()
        match job:
            case Copy():
                self._copy_rows(job, 0)
                side.half_done = job
            case Fence():
                self.at_destination(side.machine.fenced(job.transfer_id, self.now))
            case Detach():
                side.mapped.pop(job.lane, None)
        return True

    def _copy_rows(self, copy: Copy, half: int) -> None:
        rows = self.destination.mapped[copy.lane].memory.rows
        first = copy.span.start // BLOCK
        for layer in copy.span.layers:
            for position in range(copy.span.start, copy.span.stop):
                if position % 2 != half:
                    continue
                here, there = copy.source_blocks[position // BLOCK - first], copy.destination_blocks[position // BLOCK - first]
                assert self.destination.memory.lent.get((copy.span.group, there)) == copy.transfer_id, "a copy into another's block"
                self.destination.memory.rows[layer, there, position % BLOCK] = rows.get((layer, here, position % BLOCK))

    # -- what a pair does ---------------------------------------------------------------------------------------------

    def connect(self) -> None:
        lane = self.source.connecting.pop(0)
        self.at_source(self.source.machine.connected(lane, self.now))

    def stage_step(self) -> bool:
        """The source fills a staging slot; with rubbish, if the blocks have been taken back."""
        if not self.source.staging:
            return False
        stage = self.source.staging.popleft()
        rows = {}
        for layer in stage.span.layers:
            for position in range(stage.span.start, stage.span.stop):
                block = stage.blocks[position // BLOCK - stage.span.start // BLOCK]
                rows[layer, position] = self.source.memory.rows.get((layer, block, position % BLOCK))
        checksum = hash(str(rows)) & 0xFFFF
        self.source.slots[stage.lane, stage.slot] = stage.span, rows, checksum
        self.at_source(self.source.machine.staged(stage.lane, stage.slot, checksum, self.now))
        return True

    def receive_step(self, wire: Wire) -> bool:
        """The pair's next piece arrives, if it is sent and its announcement has come."""
        side, lane = self.destination, wire.destination_lane
        if lane is None or not wire.destination_open or not wire.pair or not side.receives.get(lane):
            return False
        slot, (span, rows, checksum) = wire.pair.popleft()
        receive = side.receives[lane].popleft()
        assert (receive.span, receive.checksum) == (span, checksum), "the two ends are out of step"
        if wire.source_open:
            self.at_source(self.source.machine.sent(wire.source_lane, slot, self.now))
        if receive.blocks is None or receive.transfer_id in side.given_up:
            return True
        for (layer, position), row in rows.items():
            block = receive.blocks[position // BLOCK - span.start // BLOCK]
            assert side.memory.lent.get((span.group, block)) == receive.transfer_id, "a piece into another's block"
            side.memory.rows[layer, block, position % BLOCK] = row
        self.at_destination(side.machine.copied(receive.transfer_id, receive.seq, None, self.now))
        return True

    def break_pair(self, wire: Wire, *, source_first: bool) -> None:
        """Its connection ends; one end notices before the other."""
        for at_source in (source_first, not source_first):
            if at_source and wire.source_open:
                self.at_source(self.source.machine.pair_broken(wire.source_lane, "a pair broke", self.now))
            elif not at_source and wire.destination_open and wire.destination_lane is not None:
                self.at_destination(self.destination.machine.pair_broken(wire.destination_lane, "a pair broke", self.now))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.at_source(self.source.machine.expire(self.now))
        self.at_destination(self.destination.machine.expire(self.now))

    def restart_source(self) -> None:
        """SIGKILL, and another process in its place. Memory that the destination has mapped stays as it was."""
        self._kill(self.wires, "source")
        self.dialling.clear()
        self.incarnations += 1
        self.source = SourceSide(self.incarnations, self.transports)

    def restart_destination(self) -> None:
        self._kill(self.wires, "destination")
        self.incarnations += 1
        self.destination = DestinationSide(self.incarnations, self.transports)

    def _kill(self, wires: list[Wire], end: str) -> None:
        for wire in wires:
            self.cut(wire, lose=False)
            if end == "source":
                wire.source_open = False
                wire.to_source.clear()
            else:
                wire.destination_open = False
                wire.to_destination.clear()

    # -- carrying out actions -----------------------------------------------------------------------------------------

    def at_source(self, actions: list[Any]) -> None:
        side = self.source
        for action in actions:
            match action:
                case Dial(lane, _):
                    self.dialling.append(Wire(lane))
                case Send(lane, message):
                    wire = next(wire for wire in self.wires if wire.source_lane == lane and wire.source_open)
                    if not wire.broken:
                        wire.to_destination.append(message)
                case HangUp(lane, _):
                    for wire in [wire for wire in [*self.wires, *self.dialling] if wire.source_lane == lane and wire.source_open]:
                        wire.source_open = False
                        wire.broken = True
                case Connect(lane):
                    side.connecting.append(lane)
                case Stage():
                    side.staging.append(action)
                case Post(lane, slot):
                    wire = next(wire for wire in self.wires if wire.source_lane == lane and wire.source_open)
                    wire.pair.append((slot, side.slots.pop((lane, slot))))
                case Detach(lane):
                    side.connecting = [other for other in side.connecting if other != lane]
                    side.staging = deque(stage for stage in side.staging if stage.lane != lane)
                case Fence(transfer_id, slot, word):
                    side.words[slot] = word
                    self.at_source(side.machine.fenced(transfer_id, self.now))
                case TellGranted(transfer_id):
                    side.told[transfer_id].append("granted")
                case TellHandedOver(transfer_id):
                    side.told[transfer_id].append("handed over")
                case TellFailed(transfer_id):
                    side.told[transfer_id].append("failed")
                case TellReleased(transfer_id):
                    side.told[transfer_id].append("released")
                    side.memory.give_back(transfer_id)
                    del side.prompts[transfer_id]

    def at_destination(self, actions: list[Any]) -> None:
        side = self.destination
        for action in actions:
            match action:
                case Send(lane, message):
                    wire = next(wire for wire in self.wires if wire.destination_lane == lane and wire.destination_open)
                    if not wire.broken:
                        wire.to_source.append(message)
                case HangUp(lane, _):
                    for wire in [wire for wire in self.wires if wire.destination_lane == lane and wire.destination_open]:
                        wire.destination_open = False
                        wire.broken = True
                case Attach(lane, _):
                    side.attaching.append(lane)
                case Detach(lane):
                    if lane in side.attaching:
                        side.attaching.remove(lane)
                    side.receives.pop(lane, None)
                    side.jobs.append(action)
                case Connect(lane):
                    side.receives[lane] = deque()
                case Receive(lane):
                    side.receives[lane].append(action)
                case Fence(transfer_id):
                    side.given_up.add(transfer_id)
                    side.jobs.append(action)
                case Copy():
                    side.jobs.append(action)
                case TellOffered(transfer_id, tokens):
                    side.told[transfer_id].append("offered")
                    side.waiting[transfer_id] = tokens
                    side.nearly_done.discard(transfer_id)  # of an id that was forgotten and is used again
                case TellNearlyDone(transfer_id):
                    assert transfer_id in side.waiting, "only of what is offered and not granted"
                    assert transfer_id not in side.nearly_done, "once"
                    side.nearly_done.add(transfer_id)
                case TellCommitted(transfer_id, first_tokens, kv_bytes, _):
                    side.told[transfer_id].append("committed")
                    assert first_tokens == FIRST_TOKENS
                    assert kv_bytes == self._verify(transfer_id)
                    self.committed.append(transfer_id)
                    side.memory.give_back(transfer_id)
                case TellFailed(transfer_id):
                    side.told[transfer_id].append("failed")
                    side.waiting.pop(transfer_id, None)
                case TellReleased(transfer_id):
                    side.told[transfer_id].append("released")
                    side.memory.give_back(transfer_id)

    def _verify(self, transfer_id: str) -> int:
        """Every granted position of every layer holds what the source computed; the bytes of them."""
        total = 0
        tokens = self.tokens_of(transfer_id)
        for group, granted in zip(GROUPS, self.destination.granted[transfer_id], strict=True):
            for layer in group.layers:
                for position in range(granted.first_position, tokens):
                    block = granted.blocks[(position - granted.first_position) // BLOCK]
                    held = self.destination.memory.rows.get((layer, block, position % BLOCK))
                    assert held == (transfer_id, layer, position), "a committed transfer holds something else"
                    total += group.token_bytes
        return total

    @staticmethod
    def tokens_of(transfer_id: str) -> int:
        """Ids are made as `<number>/<tokens>`, so that a check need not ask the machines."""
        return int(transfer_id.partition("/")[2])

    # -- ends ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.source.machine.check()
        self.destination.machine.check()
        for told in self.source.told.values():
            assert told in ([], *SOURCE_STORIES), told
        for told in self.destination.told.values():
            assert told in ([], *DESTINATION_STORIES), told

    def run_dry(self) -> None:
        """Carry everything through until nothing happens by itself any more."""
        busy = True
        while busy:
            busy = False
            for wire in list(self.dialling):
                self.dial(wire)
                busy = True
            for lane in list(self.destination.attaching):
                self.attach(lane)
                busy = True
            for wire in self.wires:
                busy |= self.deliver(wire, to_source=True)
                busy |= self.deliver(wire, to_source=False)
                busy |= self.receive_step(wire)
            while self.source.connecting:
                self.connect()
                busy = True
            busy |= self.copy_step()
            busy |= self.stage_step()

    def check_nearly_done(self) -> None:
        """After everything was carried through: the destination knows which of the prompts that wait for a grant are nearly done."""
        waiting = self.destination.waiting.keys() & self.source.prompts.keys()
        nearly_done = {i for i in waiting if max(self.source.prompts[i].stored.values()) == self.tokens_of(i)}
        assert self.destination.nearly_done & waiting == nearly_done

    def settle(self) -> None:
        """Both workers give up what they have, waits run out, and nothing may be left anywhere."""
        self.run_dry()
        for transfer_id in list(self.source.prompts):
            self.cancel_at_source(transfer_id)
        for transfer_id in self.destination.told:
            self.cancel_at_destination(transfer_id)
        self.run_dry()
        self.advance(100.0)
        self.run_dry()
        self.check()
        source, destination = self.source, self.destination
        assert source.machine.transfers == destination.machine.transfers == destination.machine.leases == destination.machine.parked == 0
        assert not source.memory.lent
        assert not destination.memory.lent
        assert source.machine.next_deadline() is None
        assert destination.machine.next_deadline() is None
        assert all(told[-1] == "released" for told in source.told.values())
        assert all(told[-1] in ("committed", "released") for told in destination.told.values())


SOURCE_STORIES = [
    [*granted, *end, *released]
    for granted in ([], ["granted"])
    for end in ([], ["handed over"], ["failed"])
    for released in ([], ["released"])
    if not (released and not end) and not (end == ["handed over"] and not granted) and (granted or end)
]
DESTINATION_STORIES = [
    ["offered"],
    ["offered", "committed"],
    ["offered", "failed"],
    ["offered", "failed", "released"],
    ["failed", "released"],
]
