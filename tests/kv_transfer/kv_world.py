"""Two machines, a wire, two memories and a clock, all in one thread: every step of a transfer happens when a test says so.

Memory is a table: (rank, layer, KV head, block, row) → what was written there. A worker's blocks are overwritten as soon as they are
released, so a copy that should not count brings rubbish. The copy has two halves with anything in between, and every rank of the
destination copies, and every rank of the source sets its epoch words, in its own time; the first rank of the source does so at once.

Over gloo a pair is a queue of what was posted: the destination receives in the order of the announcements, and it must be just that.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from diptych.core.layout import CacheGroup, CacheKind, DType, Layout, RankLayout
from diptych.core.request import Token
from diptych.core.transfer import GroupGrant, Hello, RefusedReason, ShmEndpoint, Transport
from diptych.engine.batch import NO_BLOCK
from diptych.kv_transfer.actions import (
    Attach,
    Connect,
    Copy,
    Detach,
    Dial,
    Fence,
    HangUp,
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
from diptych.kv_transfer.slices import first_positions, routes
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


def many(tp: int, stages: tuple[int, ...], block_size: int = BLOCK) -> Layout:
    """A worker of several ranks, for a model of two KV heads."""
    groups = tuple(replace(group, kv_heads=2) for group in GROUPS)
    return Layout("model", groups, block_size, (40, 40), tp, stages)


FIRST_TOKENS = (Token(0, 7),)


SHM, GLOO = (Transport.SHM,), (Transport.GLOO,)


def hello(worker_id: str, incarnation: int, layout: Layout = LAYOUT, transports: tuple[Transport, ...] = SHM) -> Hello:
    return Hello(worker_id, incarnation, layout, (ShmEndpoint("socket", b"n" * 16),) * layout.ranks, transports)


class Memory:
    """Free blocks per group, the transfer each block is lent to, and rows."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.free = [list(range(count)) for count in layout.num_blocks]
        self.lent: dict[tuple[int, int], str] = {}
        self.rows: dict[tuple[int, int, int, int, int], Any] = {}
        self.held = [(rank.rank, group, layer, head) for rank, group, layer, head in held(layout)]

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
            for rank, layer, head in [(rank, layer, head) for rank, of, layer, head in self.held if of == group]:
                for row in range(self.layout.block_size):
                    self.rows[rank, layer, head, block, row] = "rubbish"


def held(layout: Layout) -> Iterator[tuple[RankLayout, int, int, int]]:
    """Every layer and head of every group that each rank holds."""
    for rank in map(layout.on, range(layout.ranks)):
        for group in range(len(layout.groups)):
            yield from ((rank, group, layer, head) for layer in rank.layers(group) for head in rank.heads(group))


def block_of(blocks: tuple[int, ...], span: Span, position: int, size: int) -> int:
    """The one of a piece's `blocks` that holds `position`."""
    return blocks[position // size - span.start // size]


Parcel = tuple[Span, dict[tuple[int, int, int], Any], bool]
"""A piece on its way: its span, (layer, head, position) → row, whether its seal is right."""


@dataclass
class Wire:
    """One lane. Each end has its own number for it, and learns of its end for itself."""

    source_lane: int
    destination_lane: int | None = None
    to_source: deque[Any] = field(default_factory=deque)
    to_destination: deque[Any] = field(default_factory=deque)
    pair: dict[int, deque[Parcel]] = field(default_factory=lambda: defaultdict(deque))
    """By route, posted by the source and not received."""
    source_open: bool = True
    destination_open: bool = True
    broken: bool = False


class Prompt:
    """What the source's worker has of one prompt: its blocks, and how far the layers have come on each rank."""

    def __init__(self, transfer_id: str, tokens: int, tables: tuple[tuple[int, ...], ...], layout: Layout) -> None:
        self.transfer_id = transfer_id
        self.tokens = tokens
        self.tables = tables
        self.stored = {(rank.rank, layer): 0 for rank, _, layer, _ in held(layout)}
        self.committed = False

    def tables_at(self, start: int, stop: int, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """As the step has them that computes [start, stop): of a window group only what its queries see and store."""
        size, tables = layout.block_size, []
        for group, table in zip(layout.groups, self.tables, strict=True):
            first, end = (group.first_needed(start) // size, -(-stop // size)) if group.window else (0, len(table))
            tables.append((NO_BLOCK,) * first + table[first:end])
        return tuple(tables)


class SourceSide:
    def __init__(self, incarnation: int, transports: tuple[Transport, ...], layout: Layout) -> None:
        self.machine = SourceMachine(hello("P", incarnation, layout, transports), LEASE_S, SLOTS)
        self.connecting: list[tuple[int, int]] = []
        self.staging: dict[int, deque[Stage]] = defaultdict(deque)
        self.memory = Memory(layout)
        self.words: Counter[tuple[int, int]] = Counter()
        self.fences: deque[tuple[Fence, int]] = deque()
        self.prompts: dict[str, Prompt] = {}
        self.told: dict[str, list[str]] = {}


class DestinationSide:
    def __init__(self, incarnation: int, transports: tuple[Transport, ...], layout: Layout) -> None:
        self.machine = DestinationMachine(hello("D", incarnation, layout, transports), LEASE_S, OFFER_WAIT_S, SLOTS)
        self.memory = Memory(layout)
        self.receives: dict[int, dict[int, deque[Receive]]] = {}
        self.given_up: set[tuple[str, int]] = set()
        self.jobs: list[deque[Copy | Fence | Detach]] = [deque() for _ in range(layout.ranks)]
        self.half_done: dict[int, Copy] = {}
        self.attaching: list[int] = []
        self.mapped: dict[tuple[int, int], SourceSide] = {}
        self.waiting: dict[str, int] = {}
        self.nearly_done: set[str] = set()
        self.granted: dict[str, tuple[GroupGrant, ...]] = {}
        self.told: dict[str, list[str]] = {}
        self.expected: list[str] = []


class World:
    def __init__(self, transports: tuple[Transport, ...] = SHM, here: Layout = LAYOUT, there: Layout = LAYOUT) -> None:
        """`here` is the source's layout, `there` the destination's."""
        self.now = 0.0
        self.here, self.there = here, there
        self.routes = routes(here, there)
        self.turn = 0
        self.transports = transports
        self.incarnations = 2
        self.source = SourceSide(1, transports, here)
        self.destination = DestinationSide(2, transports, there)
        self.wires: list[Wire] = []
        self.dialling: list[Wire] = []
        self.committed: list[str] = []

    # -- what the workers do ------------------------------------------------------------------------------------------

    def offer(self, transfer_id: str, tokens: int) -> None:
        source = self.source
        tables = [source.memory.take(group, -(-tokens // self.here.block_size), transfer_id) for group in range(len(GROUPS))]
        if None in tables:
            source.memory.give_back(transfer_id)
            return
        source.prompts[transfer_id] = Prompt(transfer_id, tokens, tuple(table for table in tables if table is not None), self.here)
        source.told[transfer_id] = []
        self.at_source(source.machine.offer(transfer_id, "D:1", tokens, self.now))

    def compute(self, transfer_id: str, layers: tuple[int, ...], count: int, rank: int | None = None) -> None:
        """Store KV of the next `count` positions of `layers` (those that stand where the first of them stands) on `rank`, or on all."""
        prompt = self.source.prompts[transfer_id]
        for number in range(self.here.ranks) if rank is None else (rank,):
            here = tuple(layer for layer in layers if (number, layer) in prompt.stored)
            start = prompt.stored[number, here[0]] if here else 0
            here = tuple(layer for layer in here if prompt.stored[number, layer] == start)
            if here:
                self._store(prompt, number, here, start, min(start + count, prompt.tokens))

    def _store(self, prompt: Prompt, rank: int, layers: tuple[int, ...], start: int, stop: int) -> None:
        size = self.here.block_size
        for _, group, layer, head in [of for of in self.source.memory.held if of[0] == rank and of[2] in layers]:
            for position in range(start, stop):
                block = prompt.tables[group][position // size]
                self.source.memory.rows[rank, layer, head, block, position % size] = (prompt.transfer_id, layer, head, position)
            prompt.stored[rank, layer] = stop
        self.source.machine.computed(prompt.transfer_id, layers, start, stop, prompt.tables_at(start, stop, self.here), rank)

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
        size = self.there.block_size
        for number, group in enumerate(self.there.groups):
            first = min(cached_blocks, tokens // size) * size
            first = max(first, group.first_needed(tokens) // size * size)
            blocks = self.destination.memory.take(number, -(-(tokens - first) // size), transfer_id)
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
        """One more rank of the destination does."""
        self.destination.attaching.remove(lane)
        rank = self.destination.attaching.count(lane)
        if well:
            self.destination.mapped[lane, rank] = self.source
            self.at_destination(self.destination.machine.attached(lane, self.now, rank))
        else:
            self.at_destination(self.destination.machine.not_attached(lane, "no shared memory", self.now, rank))

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

    def in_turn(self, count: int) -> list[int]:
        """The numbers below `count`, each first in its turn."""
        self.turn += 1
        return [(self.turn + number) % count for number in range(count)]

    def copy_step(self) -> bool:
        """A rank's copy thread does half a copy, or one other thing; False if none has anything to do."""
        return any(self._copy_step(rank) for rank in self.in_turn(self.there.ranks))

    def _copy_step(self, rank: int) -> bool:
        side = self.destination
        if rank in side.half_done:
            copy = side.half_done.pop(rank)
            self._copy_rows(copy, 1)
            source = self.routes[copy.route].source
            stands = side.mapped[copy.lane, rank].words[source, copy.slot] == copy.word
            error = None if stands else "The source took its blocks back."
            self.at_destination(side.machine.copied(copy.transfer_id, copy.seq, error, self.now))
            return True
        if not side.jobs[rank]:
            return False
        job = side.jobs[rank].popleft()
        match job:
            case Copy():
                self._copy_rows(job, 0)
                side.half_done[rank] = job
            case Fence():
                side.given_up.add((job.transfer_id, rank))
                self.at_destination(side.machine.fenced(job.transfer_id, self.now, rank))
            case Detach():
                side.mapped.pop((job.lane, rank), None)
        return True

    def _copy_rows(self, copy: Copy, half: int) -> None:
        route = self.routes[copy.route]
        rows = self.destination.mapped[copy.lane, route.destination].memory.rows
        for layer, head, position in self._rows_of(copy.route, copy.span):
            if position % 2 == half:
                here = block_of(copy.source_blocks, copy.span, position, self.here.block_size)
                row = rows.get((route.source, layer, head, here, position % self.here.block_size))
                self._take(copy.transfer_id, copy.route, copy.span, copy.destination_blocks, layer, head, position, row)

    def _rows_of(self, route: int, span: Span) -> list[tuple[int, int, int]]:
        """Layer, KV head and position of each row of a piece."""
        first = self.routes[route].first_heads[span.group]
        heads = range(first, first + self.routes[route].groups[span.group].kv_heads)
        return [(layer, head, position) for layer in span.layers for head in heads for position in range(span.start, span.stop)]

    def _take(
        self, transfer_id: str, route: int, span: Span, blocks: tuple[int, ...], layer: int, head: int, position: int, row: Any
    ) -> None:
        memory, size = self.destination.memory, self.there.block_size
        block = block_of(blocks, span, position, size)
        assert memory.lent.get((span.group, block)) == transfer_id, "a copy into another's block"
        memory.rows[self.routes[route].destination, layer, head, block, position % size] = row

    def fence_step(self) -> bool:
        """A rank of the source sets an epoch word; False if none has to."""
        if not self.source.fences:
            return False
        fence, rank = self.source.fences.popleft()
        self.source.words[rank, fence.slot] = fence.word
        self.at_source(self.source.machine.fenced(fence.transfer_id, self.now, rank))
        return True

    # -- what a pair does ---------------------------------------------------------------------------------------------

    def connect(self) -> None:
        lane, route = self.source.connecting.pop(0)
        self.at_source(self.source.machine.connected(lane, self.now, route))

    def stage_step(self) -> bool:
        """A rank of the source fills a staging slot and posts it; with rubbish, if the blocks have been taken back."""
        route = next((route for route in self.in_turn(len(self.routes)) if self.source.staging.get(route)), None)
        if route is None:
            return False
        stage = self.source.staging[route].popleft()
        rows = {}
        for layer, head, position in self._rows_of(route, stage.span):
            block = block_of(stage.blocks, stage.span, position, self.here.block_size)
            key = self.routes[route].source, layer, head, block, position % self.here.block_size
            rows[layer, head, position] = self.source.memory.rows.get(key)
        stands = self.source.words[self.routes[route].source, stage.slot] == stage.word
        wire = next(wire for wire in self.wires if wire.source_lane == stage.lane and wire.source_open)
        wire.pair[route].append((stage.span, rows, stands))
        return True

    def receive_step(self, wire: Wire) -> bool:
        """The next piece of a pair arrives, if it is sent and its announcement has come."""
        side, lane = self.destination, wire.destination_lane
        if lane is None or not wire.destination_open or lane not in side.receives:
            return False
        route = next((route for route in self.in_turn(len(self.routes)) if wire.pair.get(route) and side.receives[lane].get(route)), None)
        if route is None:
            return False
        span, rows, stands = wire.pair[route].popleft()
        receive = side.receives[lane][route].popleft()
        assert receive.span == span, "the two ends are out of step"
        if wire.source_open:
            self.at_source(self.source.machine.sent(wire.source_lane, 1, self.now, route))
        if receive.blocks is None or (receive.transfer_id, self.routes[route].destination) in side.given_up:
            return True
        for (layer, head, position), row in rows.items():
            self._take(receive.transfer_id, route, span, receive.blocks, layer, head, position, row)
        self.at_destination(side.machine.copied(receive.transfer_id, receive.seq, None if stands else "Its seal is wrong.", self.now))
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
        self.source = SourceSide(self.incarnations, self.transports, self.here)

    def restart_destination(self) -> None:
        self._kill(self.wires, "destination")
        self.incarnations += 1
        self.destination = DestinationSide(self.incarnations, self.transports, self.there)

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
                    side.connecting += [(lane, route) for route in range(len(self.routes))]
                case Stage():
                    side.staging[action.route].append(action)
                case Detach(lane):
                    side.connecting = [other for other in side.connecting if other[0] != lane]
                    for route, stages in side.staging.items():
                        side.staging[route] = deque(stage for stage in stages if stage.lane != lane)
                case Fence(transfer_id, slot, word):
                    side.words[0, slot] = word
                    side.fences.extend((action, rank) for rank in range(1, self.here.ranks))
                    self.at_source(side.machine.fenced(transfer_id, self.now, 0))
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
                    side.attaching += [lane] * self.there.ranks
                case Detach(lane):
                    side.attaching = [other for other in side.attaching if other != lane]
                    side.receives.pop(lane, None)
                    for jobs in side.jobs:
                        jobs.append(action)
                case Connect(lane):
                    side.receives[lane] = defaultdict(deque)
                case Receive(lane):
                    side.receives[lane][action.route].append(action)
                case Fence(transfer_id):
                    side.given_up.add((transfer_id, 0))
                    for jobs in side.jobs:
                        jobs.append(action)
                case Copy():
                    side.jobs[self.routes[action.route].destination].append(action)
                case TellOffered(transfer_id, tokens):
                    side.told[transfer_id].append("offered")
                    side.waiting[transfer_id] = tokens
                    side.nearly_done.discard(transfer_id)  # of an id that was forgotten and is used again
                case TellNearlyDone(transfer_id):
                    assert transfer_id in side.waiting, "only of what is offered and not granted"
                    assert transfer_id not in side.nearly_done, "once"
                    side.nearly_done.add(transfer_id)
                case TellCommitted(transfer_id, first_tokens, kv_bytes, _, lacking):
                    side.told[transfer_id].append("committed")
                    assert first_tokens == FIRST_TOKENS
                    assert lacking == self._lacking(transfer_id)
                    assert kv_bytes == self._verify(transfer_id)
                    self.committed.append(transfer_id)
                    side.memory.give_back(transfer_id)
                case TellFailed(transfer_id):
                    side.told[transfer_id].append("failed")
                    side.waiting.pop(transfer_id, None)
                case TellReleased(transfer_id):
                    side.told[transfer_id].append("released")
                    side.memory.give_back(transfer_id)

    def _lacking(self, transfer_id: str) -> tuple[int, ...]:
        """The groups in whose first granted block a whole block of the source is missing, or what is left of one."""
        granted, tokens, size = self.destination.granted[transfer_id], self.tokens_of(transfer_id), self.here.block_size
        needed = [group.first_needed(tokens) // size * size for group in self.here.groups]
        return tuple(g for g, grant in enumerate(granted) if any(position < needed[g] for position in range(grant.first_position, tokens)))

    def _verify(self, transfer_id: str) -> int:
        """Every granted position of every layer holds what the source computed; the bytes of them."""
        total = 0
        tokens = self.tokens_of(transfer_id)
        granted, size = self.destination.granted[transfer_id], self.there.block_size
        firsts = first_positions(self.here, granted, tokens)
        for rank, group, layer, head in self.destination.memory.held:
            for position in range(firsts[group], tokens):
                block = granted[group].blocks[(position - granted[group].first_position) // size]
                found = self.destination.memory.rows.get((rank, layer, head, block, position % size))
                assert found == (transfer_id, layer, head, position), "a committed transfer holds something else"
                total += 2 * self.here.groups[group].head_dim * self.here.groups[group].dtype.itemsize
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
            busy |= self.fence_step()

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
