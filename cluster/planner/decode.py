"""A simulated decode worker: the production scheduler and destination machine. Pure.

Its steps come in *rounds*, in which each sequence is in one step (with one stage a round is a step). While the scheduler says that nothing
changes (`steady`) they are not made one by one: a *stretch* of them is, with `advance`, when a message comes or the stretch ends. A round
that has begun is never changed by what comes while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.commands import Decode
from ...core.transfer import GroupGrant, LaneMessage
from ...decode_worker.choices import DecodeOutcome
from ...decode_worker.decision import Decision
from ...decode_worker.scheduler import DecodeScheduler
from ...kv_transfer.actions import Attach, Copy, Fence, Send, TellCommitted, TellFailed, TellNearlyDone, TellOffered, TellReleased
from ...kv_transfer.destination_machine import DestinationMachine
from .figures import Histogram
from .lane import Lane
from .latency import Work, decode_seconds, step_seconds, steps_within
from .life import TOKEN, Life, request_of
from .profile import Hardware
from .worker import SLOTS, Scene, Worker, output_of, root_of, work_of


@dataclass(frozen=True, slots=True)
class Stretch:
    """`rounds` like rounds from `begun` on, of `rows` sequences in each step, which attend to `context` tokens in the first."""

    begun: float
    rounds: int
    rows: int
    context: int


class DecodeWorker(Worker):
    """`itl`: gaps between tokens of one request, from its second on; the pause of a preempted one is not among them."""

    def __init__(self, scene: Scene, hardware: Hardware, name: str, number: int, itl: Histogram) -> None:
        super().__init__(scene, hardware, name, number)
        policies = scene.policies
        self.scheduler = DecodeScheduler(
            self.pool,
            root_hash_of=root_of,
            chunk_tokens=policies.decode_chunk_tokens,
            max_running=policies.decode_running,
            max_context=scene.model.max_context,
            eos_token_ids=(),
            watermark=policies.watermark,
            stages=hardware.pp,
        )
        self.machine = DestinationMachine(self.hello, policies.lease_s, policies.offer_wait_s, SLOTS)
        self.lanes: dict[int, Lane] = {}
        self._itl = itl
        self._stretch: Stretch | None = None
        self._flying: list[Decision] = []
        self._round = 0
        self._began = 0.0
        self._busy = False
        self._joined: list[str] = []
        self._copying_until = 0.0

    # -- what comes from outside ---------------------------------------------------------------------------------------

    def expect(self, life: Life, *, local: bool) -> None:
        self.opened(1, life.arrival.prompt_tokens if local else 0)
        self._settle()
        self.scheduler.expect(Decode(life.name, request_of(life.arrival), local_prefill=local), self.now)
        if not local:
            self.do(self.machine.expect(life.name, self.now))
        self._turn()

    def received(self, lane: int, message: LaneMessage) -> None:
        self.do(self.machine.received(lane, message, self.now))

    def do(self, actions: list[Any]) -> None:
        turn = False
        for action in actions:
            match action:
                case Send(lane, message):
                    self.agenda.after(self.scene.message_s, self.lanes[lane].to_source, message)
                case Copy():
                    self._copying_until = max(self._copying_until, self.now) + self._copy_seconds(action)
                    self.agenda.at(self._copying_until + self.scene.link.latency, self._copied, action.transfer_id, action.seq)
                case TellOffered(name, tokens):
                    self._settle()
                    refused = self.scheduler.on_offer(name, tokens, self.now)
                    assert refused is None, "an offer is refused"
                    turn = True
                case TellNearlyDone(name):
                    self._settle()
                    self.scheduler.nearly_done(name, self.now)
                    turn = True
                case TellCommitted(name, first_tokens):
                    self._settle()
                    self._joined.append(name)
                    self._take(self.scheduler.committed(name, first_tokens, self.now))
                    turn = True
                case Attach(lane):
                    self.do(self.machine.attached(lane, self.now))
                case Fence() | TellFailed() | TellReleased() | _:
                    raise AssertionError(f"nothing breaks here, and yet {action}")
        self.watch_leases()
        if turn:
            self._turn()

    def _copied(self, transfer_id: str, seq: int) -> None:
        self.do(self.machine.copied(transfer_id, seq, None, self.now))

    def _copy_seconds(self, copy: Copy) -> float:
        """What is still to be copied when a piece is announced: if its blocks were lent while it was computed and the link overlaps, the
        last layer; else all of it."""
        scene, span = self.scene, copy.span
        share = len(span.layers) / len(scene.groups)
        seconds = (span.stop - span.start) * scene.model.kv_token_bytes * share / scene.link.bytes_per_s
        life = scene.told.lives()[copy.transfer_id]
        early = life.granted is not None and self.now - life.granted > seconds
        return seconds / scene.model.layers if early and scene.link.overlap else seconds

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Grants, then a round, as the loop does it."""
        self._grant(self.scheduler.grants(self.now))
        if not self._busy:
            self._begin()
        self.changed()

    def _grant(self, made: list[tuple[str, tuple[GroupGrant, ...]]]) -> None:
        for name, blocks in made:
            self.scene.told.lives()[name].granted = self.now
            self.do(self.machine.grant(name, blocks, self.now))

    def _begin(self) -> None:
        rounds = self.scheduler.steady()
        if rounds:
            self._begin_stretch(rounds)
            return
        while len(self._flying) < self.hardware.pp and (decision := self.scheduler.decide(self.now)) is not None:
            self._flying.append(decision)
        self._grant(self.scheduler.new_grants())
        if self._flying:
            self._start(self._round_seconds())

    def _start(self, seconds: float) -> None:
        self._busy, self._began = True, self.now
        self._round += 1
        self.agenda.after(seconds, self._over, self._round)

    def _begin_stretch(self, rounds: int) -> None:
        rows, context = self.scheduler.running
        stages = self.hardware.pp
        stretch = self._stretch = Stretch(self.now, rounds, -(-rows // stages), -(-context // stages))
        first = self._seconds(stretch, 1)
        for name in self._joined:
            self._second(name, self.now + first)
        self._joined = []
        self._start(self._seconds(stretch, rounds))

    def _seconds(self, stretch: Stretch, rounds: int) -> float:
        return decode_seconds(self.hardware.times, stretch.rows, stretch.context, rounds, self.hardware.pp)

    def _settle(self) -> None:
        """A message has come: of a stretch the rounds that have begun by now are made, and the last of them goes on."""
        if (stretch := self._stretch) is None:
            return
        times, stages = self.hardware.times, self.hardware.pp
        rounds = steps_within(times, stretch.rows, stretch.context, self.now - stretch.begun, stretch.rounds, stages)
        self._make(stretch, rounds)
        self._round += 1
        self.agenda.at(stretch.begun + self._seconds(stretch, rounds), self._over, self._round)

    def _make(self, stretch: Stretch, rounds: int) -> None:
        self._stretch = None
        attempts = len(self.scheduler.advance(rounds, TOKEN, self.now))
        seconds = self._seconds(stretch, rounds)
        self._itl.add(seconds / max(1, rounds), attempts * rounds)
        self.course.busy += seconds
        self.course.steps += rounds * self.hardware.pp

    def _over(self, number: int) -> None:
        """The round by that number has ended, if it is still that which runs."""
        if number != self._round:
            return
        self._busy = False
        if self._stretch is not None:
            self._make(self._stretch, self._stretch.rounds)
        elif self._flying:
            self._complete()
        self._turn()

    def _complete(self) -> None:
        seconds = self.now - self._began
        self.course.busy += seconds
        self.course.steps += len(self._flying)
        rows = 0
        for decision in self._flying:
            outcome = self.scheduler.complete(output_of(decision.batch), self.now)
            for new in outcome.new_tokens:
                rows += 1
                self._second(new.attempt_id, self.now)
            self._take(outcome)
        if rows:
            self._itl.add(seconds, rows)
        self._flying, self._joined = [], []

    def _second(self, name: str, now: float) -> None:
        """A token of that request: perhaps its first, read and written here, or its second."""
        life = self.scene.told.lives()[name]
        if life.first is None:
            self.opened(0, -life.arrival.prompt_tokens)
            self.course.queued.add(now - life.arrival.at)
            self.scene.told.first_token(name, now, last=False)
        elif life.second is None:
            life.second = now

    def _take(self, outcome: DecodeOutcome) -> None:
        for finished in outcome.finished:
            self.opened(-1, 0)
            self.scene.told.ended(finished.attempt_id, self.now)

    def _round_seconds(self) -> float:
        """Steps follow each other through the stages."""
        stages = self.hardware.pp
        each = [step_seconds(self.hardware.times, self._work(decision), stages) for decision in self._flying]
        return max(*each, sum(each) / stages) if len(each) > 1 else each[0]

    def _work(self, decision: Decision) -> Work:
        """A row computes a part of a prompt if it is long, or stands within one."""
        lives = self.scene.told.lives()
        rows = zip(decision.attempts, decision.batch.rows, strict=True)
        return work_of(decision.batch, [row.length > 1 or row.start + 1 < lives[name].arrival.prompt_tokens for name, row in rows])
