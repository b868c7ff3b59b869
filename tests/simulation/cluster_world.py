"""A cluster in one thread and on a clock that a test moves: the production schedulers and transfer machines, engines without arithmetic.

Time passes only in what is asked of `Costs`: steps, messages, copies. KV is really copied (`FakeEngine.cells`), so an answer is right
only if every block that it needed was.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diptych.core.clock import ManualClock
from diptych.core.commands import Decode, Prefill
from diptych.core.layout import Layout
from diptych.core.request import FinishReason, Request, Token
from diptych.core.transfer import GroupGrant, Hello, LaneMessage, ShmEndpoint, Transport
from diptych.decode_worker.admission import MAX_PASSES, Admission
from diptych.decode_worker.scheduler import DecodeOutcome, DecodeScheduler
from diptych.decode_worker.sequence import Sequence
from diptych.engine.batch import StepOutput
from diptych.engine.block_pool import BlockPool
from diptych.kv_transfer.actions import (
    Attach,
    Copy,
    Dial,
    Fence,
    Send,
    TellCommitted,
    TellFailed,
    TellGranted,
    TellHandedOver,
    TellNearlyDone,
    TellOffered,
    TellReleased,
)
from diptych.kv_transfer.destination_machine import DestinationMachine
from diptych.kv_transfer.source_machine import SourceMachine
from diptych.prefill_worker.scheduler import PrefillScheduler
from fake_engine import BLOCK, EOS, FakeEngine, answer, groups, hashes_of

CHECK_EVERY = 3
"""Events between two checks of all books."""
SLOTS = 64
LEASE_S, OFFER_WAIT_S = 10.0, 5.0
CONTEXT = 160


@dataclass(frozen=True)
class Costs:
    """Seconds that things take; a step, through all stages of its worker."""

    message: float = 0.001
    copy: float = 0.002
    prefill_step: float = 0.05
    decode_step: float = 0.02


@dataclass
class Life:
    """One request, and when what became of it."""

    name: str
    request: Request
    prefill: int
    decode: int
    arrived: float
    outputs: dict[int, list[int]] = field(default_factory=dict)
    """By choice."""
    ended: float | None = None
    ahead: set[str] = field(default_factory=set)
    """Who had D's memory, or was queued for it, when it was offered; and who was granted it since, while this one waited."""
    waited: int = 0
    """D's steps from its Offer to its Grant."""

    @property
    def work(self) -> int:
        """The most steps that D takes for it alone, one choice after the other: all of it computed once in chunks, then its tokens."""
        most = len(self.request.token_ids) + self.request.sampling.max_tokens
        return (-(-most // BLOCK) + self.request.sampling.max_tokens) * self.request.sampling.n


class World:
    """`blocks` of every group, and `stages`: of each prefill and of each decode worker. `ended` is called with each life that ends."""

    def __init__(
        self,
        prefills: int,
        decodes: int,
        *,
        windows: tuple[int, ...] = (0,),
        blocks: tuple[int, int] = (12, 12),
        stages: tuple[int, int] = (1, 1),
        chunk_tokens: int = 32,
        max_running: int = 4,
        watermark: float = 0.05,
        costs: Costs | None = None,
        ended: Callable[[Life], None] = lambda life: None,
    ) -> None:
        self.clock, self.costs, self.groups = ManualClock(), costs or Costs(), groups(*windows)
        self.ended = ended
        self.lives: dict[str, Life] = {}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._entries = 0
        scheduling: dict[str, Any] = {"hashes_of": hashes_of, "chunk_tokens": chunk_tokens, "max_running": max_running}
        scheduling |= {"max_context": CONTEXT, "eos_token_ids": EOS}
        here = scheduling | {"watermark": watermark, "stages": stages[1]}
        self.decodes = [DecodeWorker(self, i, blocks[1], stages[1], here) for i in range(decodes)]
        self.prefills = [PrefillWorker(self, i, blocks[0], stages[0], scheduling) for i in range(prefills)]

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """What falls on one moment is done in the order in which it was asked for."""
        self._entries += 1
        heapq.heappush(self._agenda, (self.clock.now() + seconds, self._entries, call))

    def run(self, until: float = float("inf"), *, check: bool = True) -> None:
        """Until then, or until nothing is left to do."""
        turns = 0
        while self._agenda and self._agenda[0][0] <= until:
            when, _, call = heapq.heappop(self._agenda)
            self.clock.advance(max(0.0, when - self.clock.now()))
            call()
            turns += 1
            if check and turns % CHECK_EVERY == 0:
                self.check()

    def ask(self, request: Request, *, prefill: int | None, decode: int) -> Life:
        """A request arrives; `prefill` None: the decode worker reads the prompt itself."""
        name = f"r{len(self.lives)}"
        life = self.lives[name] = Life(name, request, -1 if prefill is None else prefill, decode, self.clock.now())
        self.decodes[decode].expect(Decode(name, request, local_prefill=prefill is None))
        if prefill is not None:
            self.prefills[prefill].add(Prefill(name, request, str(decode)))
        return life

    def wrote(self, name: str, tokens: Iterable[Token]) -> None:
        life = self.lives[name]
        assert life.ended is None, "nothing after the end"
        for token in tokens:
            life.outputs.setdefault(token.choice, []).append(token.id)

    def finished(self, name: str) -> None:
        life = self.lives[name]
        assert life.ended is None, "one end"
        life.ended = self.clock.now()
        for choice in range(life.request.sampling.n):
            assert life.outputs.get(choice, []) == answer(life.request, self.groups, CONTEXT, choice)[0]
        self.ended(life)

    def leave(self, life: Life) -> None:
        """Its client goes away, at whatever stage."""
        if life.ended is None:
            life.ended = self.clock.now()
            if life.prefill >= 0:
                self.prefills[life.prefill].stop(life.name)
            self.decodes[life.decode].stop(life.name)
            self.ended(life)

    def check(self) -> None:
        for worker in (*self.prefills, *self.decodes):
            worker.check()

    def assert_over(self) -> None:
        """Every request has ended, and nothing is held anywhere."""
        waiting = [life.name for life in self.lives.values() if life.ended is None]
        assert not waiting, f"{waiting} wait for ever"
        for worker in (*self.prefills, *self.decodes):
            assert worker.pool.unused
            assert worker.machine.transfers == 0


class Worker:
    """Steps of one engine, at most `depth` at once: each stage computes one, and they follow each other through all stages."""

    def __init__(
        self, world: World, number: int, blocks: int, scheduler: Callable[[BlockPool], Any], step_s: float, stages: int, depth: int
    ) -> None:
        self.world, self.number, self.depth = world, number, depth
        self._step_s, self._stage_s = step_s, step_s / stages
        counts = (blocks,) * len(world.groups)
        self.pool = BlockPool(counts, world.groups, BLOCK)
        self.engine = FakeEngine(world.groups, counts, 64)
        self.layout = Layout("fake", world.groups, BLOCK, counts)
        self.scheduler = scheduler(self.pool)
        self.machine: Any
        self.steps = 0
        self._flying: deque[Any] = deque()
        self._outputs: deque[StepOutput] = deque()
        self._free_at = 0.0

    def hello(self, name: str, incarnation: int) -> Hello:
        return Hello(f"{name}{self.number}", incarnation, self.layout, (ShmEndpoint("socket", b"n" * 16),), (Transport.SHM,))

    @property
    def now(self) -> float:
        return self.world.clock.now()

    def pump(self) -> None:
        """Decide what can be decided; it runs when the first stage is free."""
        while len(self._flying) < self.depth and (decision := self.decide()) is not None:
            self._flying.append(decision)
            begins = max(self.now, self._free_at)
            self._free_at = begins + self._stage_s
            ends = begins + self._step_s - self.now
            self.world.after(ends - self._stage_s / 2, partial(self._half, decision))
            self.world.after(ends, self._ran)
            self.decided(decision)

    def _half(self, decision: Any) -> None:
        """KV is stored before the last stage ends, as layers are."""
        self._outputs.append(self.engine.run(decision.batch))
        self.stored(decision)

    def _ran(self) -> None:
        self._flying.popleft()
        self.steps += 1
        self.complete(self._outputs.popleft())
        self.turn()

    def turn(self) -> None:
        self.pump()

    def decide(self) -> Any:
        return self.scheduler.decide(self.now)

    def decided(self, decision: Any) -> None:
        """Before its step runs."""

    def stored(self, decision: Any) -> None:
        raise NotImplementedError

    def complete(self, output: StepOutput) -> None:
        raise NotImplementedError

    def check(self) -> None:
        self.scheduler.check()
        self.machine.check()


class PrefillWorker(Worker):
    """`waiting_for[d]`: blocks per group of the prompts that decode worker d has not granted, by name. `queue`: not started, in order;
    `passes`: how many later ones for the same decode worker were started before each."""

    def __init__(self, world: World, number: int, blocks: int, stages: int, scheduling: dict[str, Any]) -> None:
        super().__init__(world, number, blocks, partial(PrefillScheduler, **scheduling), world.costs.prefill_step, stages, stages + 1)
        self.chunk_tokens: int = scheduling["chunk_tokens"]
        self.machine = SourceMachine(self.hello("P", 1000 + number), LEASE_S, SLOTS)
        self.words = dict.fromkeys(range(SLOTS), 0)
        self.lanes: dict[int, Lane] = {}
        self.waiting_for: dict[str, dict[str, tuple[int, ...]]] = {}
        self.destinations: set[str] = set()
        self.alone: set[str] = set()
        """The prompts started while none had come for a second decode worker."""
        self.queue: list[str] = []
        self.passes: Counter[str] = Counter()
        self._layers = tuple(range(len(world.groups)))

    def add(self, prefill: Prefill) -> None:
        self.scheduler.add(prefill, self.now)
        self.queue.append(prefill.attempt_id)
        if prefill.destination is not None:
            self.destinations.add(prefill.destination)
        self.pump()

    def stop(self, name: str) -> None:
        if name in self.queue:
            self.queue.remove(name)
        if self.scheduler.cancel(name, self.now):
            self.do(self.machine.cancel(name, "The client has left.", self.now))
        self.pump()

    def decided(self, decision: Any) -> None:
        for started in decision.started:
            self._passed_by(started.attempt_id)
            blocks = tuple(self.pool.most_held(g, started.prompt_tokens, self.chunk_tokens) for g in range(len(self.layout.groups)))
            self.waiting_for.setdefault(started.destination, {})[started.attempt_id] = blocks
            if len(self.destinations) <= 1:
                self.alone.add(started.attempt_id)
            self.do(self.machine.offer(started.attempt_id, started.destination, started.prompt_tokens, self.now))
            if started.cached_tokens:
                self._computed(started.attempt_id, 0, started.cached_tokens, started.tables)

    def _passed_by(self, name: str) -> None:
        place, lives = self.queue.index(name), self.world.lives
        self.passes.update(other for other in self.queue[:place] if lives[other].decode == lives[name].decode)
        self.queue.remove(name)
        assert max(self.passes.values(), default=0) <= MAX_PASSES, f"P{self.number}: {self.passes.most_common(1)}"

    def stored(self, decision: Any) -> None:
        for name, row in zip(decision.attempts, decision.batch.rows, strict=True):
            self._computed(name, row.start, row.start + row.length, row.tables)

    def _computed(self, name: str, start: int, stop: int, tables: tuple[tuple[int, ...], ...]) -> None:
        if self.machine.computed(name, self._layers, start, stop, tables):
            self.do(self.machine.announce(self.now))

    def complete(self, output: StepOutput) -> None:
        for first in self.scheduler.complete(output, self.now).first_tokens:
            pairs = zip(first.tokens, first.finishes, strict=True)
            self.world.wrote(first.attempt_id, (token for token, finish in pairs if finish is not FinishReason.STOP))
            if all(first.finishes):
                self.world.finished(first.attempt_id)
                self.do(self.machine.cancel(first.attempt_id, "The first token ended it.", self.now))
            else:
                self.do(self.machine.commit(first.attempt_id, first.tokens, self.now))

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Dial(lane, address):
                    self.lanes[lane] = Lane(self, lane, self.world.decodes[int(address)])
                    self.world.after(self.world.costs.message, self.lanes[lane].open)
                case Send(lane, message):
                    self.world.after(self.world.costs.message, partial(self.lanes[lane].to_destination, message))
                case Fence(name, slot, word):
                    self.words[slot] = word
                    self.do(self.machine.fenced(name, self.now))
                case TellGranted(name):
                    self._waits_no_more(name)
                    self.scheduler.granted(name)
                case TellFailed(name):
                    self._waits_no_more(name)
                    self.scheduler.cancel(name, self.now)
                case TellReleased(name):
                    self.scheduler.release(name, self.now)
                case TellHandedOver():
                    pass
                case _:
                    raise AssertionError(f"nothing breaks here, and yet {action}")
        self.pump()

    def _waits_no_more(self, name: str) -> None:
        for waiting in self.waiting_for.values():
            waiting.pop(name, None)

    def check(self) -> None:
        """KV that one decode worker has not granted fills at most half of the pool, or is one prompt's alone, or began to before a prompt
        came for another. Nothing waits while nothing is computed and nothing is held."""
        super().check()
        assert self._flying or self.machine.transfers or not self.queue, f"P{self.number} does nothing, and {self.queue} wait"
        for destination, waiting in self.waiting_for.items():
            held = tuple(map(sum, zip(*waiting.values(), strict=True)))
            over = any(2 * blocks > count for blocks, count in zip(held, self.pool.num_blocks, strict=False))
            assert len(waiting) <= 1 or not over or [*waiting][-1] in self.alone, f"P{self.number}: D{destination} has {held} waiting"


@dataclass
class Lane:
    """A lane's two ends and what it is called on each."""

    source: PrefillWorker
    at_source: int
    destination: DecodeWorker
    at_destination: int = 0

    def open(self) -> None:
        self.at_destination = self.destination.machine.lane_opened(self.destination.now)
        self.destination.lanes[self.at_destination] = self
        self.source.do(self.source.machine.dialled(self.at_source, self.source.now))

    def to_destination(self, message: LaneMessage) -> None:
        self.destination.do(self.destination.machine.received(self.at_destination, message, self.destination.now))

    def to_source(self, message: LaneMessage) -> None:
        self.source.do(self.source.machine.received(self.at_source, message, self.source.now))


class NotingAdmission(Admission):
    """Notes how many blocks it leaves of the scarcest group: who starts again takes more, for its rows, only behind it."""

    left: int

    def admit(self, seats: int) -> list[Sequence]:
        started = super().admit(seats)
        self.left = min(self._pool.available())
        return started


class DecodeWorker(Worker):
    """`queue`: offered and not granted, in order; `passes`: how many later ones were granted before each. `below`: grants that left less
    than the watermark. Who is given memory is checked at every grant."""

    def __init__(self, world: World, number: int, blocks: int, stages: int, scheduling: dict[str, Any]) -> None:
        super().__init__(world, number, blocks, partial(DecodeScheduler, **scheduling), world.costs.decode_step, stages, max(2, stages))
        self.machine = DestinationMachine(self.hello("D", 1 + number), LEASE_S, OFFER_WAIT_S, SLOTS)
        self.lanes: dict[int, Lane] = {}
        self.queue: list[str] = []
        self.passes: Counter[str] = Counter()
        self.nearly_done: set[str] = set()
        self.holders: set[str] = set()
        self.below = 0
        self._mark = max(1, int(blocks * scheduling["watermark"]))
        self.scheduler._admission.__class__ = NotingAdmission
        self._copying_until = 0.0

    def expect(self, decode: Decode) -> None:
        self.scheduler.expect(decode, self.now)
        if decode.local_prefill:
            self.holders.add(decode.attempt_id)  # or in front of all that come later
        if not decode.local_prefill:
            self.do(self.machine.expect(decode.attempt_id, self.now))
        self.turn()

    def stop(self, name: str) -> None:
        if self.scheduler.cancel(name, self.now):
            self.do(self.machine.cancel(name, "The client has left.", self.now))
        else:
            self.holders.discard(name)
        if name in self.queue:
            self.queue.remove(name)
        self.turn()

    def turn(self) -> None:
        """Grants, then steps, as the loop does it."""
        self.grant(self.scheduler.grants(self.now))
        self.pump()

    def decide(self) -> Any:
        decision = super().decide()
        self.grant(self.scheduler.new_grants())
        return decision

    def grant(self, made: list[tuple[str, tuple[GroupGrant, ...]]]) -> None:
        grants = dict(made)
        if not grants:
            return
        assert not self.scheduler._admission.preempted, "preempted requests go before grants"
        if self.scheduler._admission.left < self._mark:
            self.below += 1
            load = self.scheduler.load(self.now)
            alone = load.running == 0 and load.leases == 1
            assert self.nearly_done & grants.keys() or alone, "only what is nearly done goes below the watermark"
        for name, blocks in grants.items():
            self._granted(name)
            self.do(self.machine.grant(name, blocks, self.now), turn=False)

    def _granted(self, name: str) -> None:
        lives, place = self.world.lives, self.queue.index(name)
        self.passes.update(self.queue[:place])
        assert max(self.passes.values(), default=0) <= MAX_PASSES, f"D{self.number}: {self.passes.most_common(1)}"
        self.queue.remove(name)
        for waiting in self.queue:
            lives[waiting].ahead.add(name)
        self.holders.add(name)
        life = lives[name]
        life.waited = self.steps - life.waited
        work = sum(lives[other].work for other in life.ahead)
        assert life.waited <= 2 * work + self.depth, f"{name} waited {life.waited} steps for {len(life.ahead)} others, {work} steps of work"

    def stored(self, decision: Any) -> None:
        return None

    def complete(self, output: StepOutput) -> None:
        self._take(self.scheduler.complete(output, self.now))

    def _take(self, outcome: DecodeOutcome) -> None:
        for new in outcome.new_tokens:
            self.world.wrote(new.attempt_id, new.tokens)
        for finished in outcome.finished:
            self.holders.discard(finished.attempt_id)
            self.world.finished(finished.attempt_id)

    def check(self) -> None:
        """Nothing waits while nothing is computed and nothing is on its way."""
        super().check()
        assert self._flying or self.machine.leases or not self.queue, f"D{self.number} does nothing, and {self.queue} wait"

    def do(self, actions: list[Any], *, turn: bool = True) -> None:
        for action in actions:
            match action:
                case Send(lane, message):
                    self.world.after(self.world.costs.message, partial(self.lanes[lane].to_source, message))
                case Attach(lane):
                    self.world.after(self.world.costs.message, partial(self._attached, lane))
                case Copy():
                    self._in_turn(self.world.costs.copy, partial(self._copy, action))
                case Fence(name):
                    self._in_turn(0.0, partial(self._fenced, name))
                case TellOffered(name, tokens):
                    life = self.world.lives[name]
                    life.ahead, life.waited = {*self.queue, *self.holders}, self.steps
                    self.queue.append(name)
                    assert self.scheduler.on_offer(name, tokens, self.now) is None
                case TellNearlyDone(name):
                    self.nearly_done.add(name)
                    self.scheduler.nearly_done(name, self.now)
                case TellCommitted(name, first_tokens):
                    self._take(self.scheduler.committed(name, first_tokens, self.now))
                case TellFailed(name):
                    if name in self.queue:
                        self.queue.remove(name)
                    self.scheduler.transfer_failed(name, self.now)
                case TellReleased(name):
                    self.holders.discard(name)
                    self.scheduler.fenced(name, self.now)
                case _:
                    raise AssertionError(f"nothing breaks here, and yet {action}")
        if turn:
            self.turn()

    def _in_turn(self, seconds: float, call: Callable[[], None]) -> None:
        """One copy after the other, and fences between them."""
        self._copying_until = max(self._copying_until, self.now) + seconds
        self.world.after(self._copying_until - self.now, call)

    def _attached(self, lane: int) -> None:
        self.do(self.machine.attached(lane, self.now))

    def _fenced(self, name: str) -> None:
        self.do(self.machine.fenced(name, self.now))

    def _copy(self, copy: Copy) -> None:
        source, span, first = self.lanes[copy.lane].source, copy.span, copy.span.start // BLOCK
        for position in range(span.start, span.stop):
            here, there = copy.source_blocks[position // BLOCK - first], copy.destination_blocks[position // BLOCK - first]
            self.engine.cells[span.group, there, position % BLOCK] = source.engine.cells[span.group, here, position % BLOCK]
        stands = source.words[copy.slot] == copy.word
        self.do(self.machine.copied(copy.transfer_id, copy.seq, None if stands else "taken back", self.now))
