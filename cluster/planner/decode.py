"""A simulated decode worker: the production scheduler and destination machine. Pure.

Its steps come in *rounds*, in which each sequence is in one step (with one stage a round is a step). While the scheduler says that nothing
changes (`steady`) they are not made one by one: a *stretch* of them is, with `advance`, when a message comes or the stretch ends. A round
that has begun is never changed by what comes while it runs: the stretch that follows a message begins when that round ends.
"""

from __future__ import annotations

from typing import Any

from ...core.commands import Decode
from ...core.request import Token
from ...core.transfer import GroupGrant, LaneMessage
from ...core.value import value
from ...decode_worker.choices import DecodeOutcome
from ...decode_worker.decision import Decision
from ...decode_worker.scheduler import DecodeScheduler
from ...kv_transfer.actions import Attach, Copy, Fence, Send, TellCommitted, TellFailed, TellNearlyDone, TellOffered, TellReleased
from ...kv_transfer.destination_machine import DestinationMachine
from .figures import Histogram
from .lane import Lane
from .latency import Pace, Rounds, StepTimes, Work, step_seconds
from .life import TOKEN, Life, hashes_of
from .profile import Hardware
from .worker import SLOTS, Scene, Worker, output_of, work_of


@value
class Stretch:
    """So many like rounds from `begun` on, of `rows` sequences; the last may end some."""

    begun: float
    count: int
    rows: int
    times: Rounds

    def after(self, rounds: int) -> float:
        """When the first so many have ended."""
        return self.begun + self.times.seconds(rounds)

    def begun_by(self, now: float) -> int:
        """Rounds that are complete or run."""
        return self.times.begun(now - self.begun, self.count) if now >= self.begun else 0


class DecodeWorker(Worker):
    """`itl`: gaps between tokens of one request, from its second on; the pause of a preempted one is not among them."""

    def __init__(self, scene: Scene, hardware: Hardware, name: str, number: int, itl: Histogram) -> None:
        super().__init__(scene, hardware, name, number)
        policies = scene.policies
        self.scheduler = DecodeScheduler(
            self.pool,
            hashes_of=hashes_of,
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
        """Those that are not made yet: from now on, or from the end of the round that runs."""
        self._cut: tuple[float, float] | None = None
        """Of a stretch that a message has ended: when the round that runs is over, and when all of it would have been."""
        self._timed: StepTimes | None = None
        self._paces: dict[int, Pace] = {}
        self._flying: list[Decision] = []
        self._round = self._rows = 0
        self._began = 0.0
        self._busy = self._ending = False
        self._joined: list[Life] = []
        """Those with a first token, whose second the next round writes."""
        self._copying_until = 0.0
        self.changed()

    # -- what comes from outside ---------------------------------------------------------------------------------------

    def expect(self, life: Life, *, local: bool) -> None:
        self.opened(1, life.arrival.prompt_tokens if local else 0)
        if local:
            self._read(life)
        else:
            self.scheduler.expect(Decode(life.name, life.request), self.agenda.now)
            self.do(self.machine.expect(life.name, self.agenda.now))
            self.watch_leases()

    def _read(self, life: Life) -> None:
        """The prompt, here."""
        self._settle()
        self.scheduler.expect(Decode(life.name, life.request, local_prefill=True), self.agenda.now)
        self._turn()

    def _committed(self, name: str, first_tokens: tuple[Token, ...]) -> None:
        self._settle()
        self._joined.append(self.scene.lives[name])
        self._take(self.scheduler.committed(name, first_tokens, self.agenda.now))
        self._turn()

    def received(self, lane: int, message: LaneMessage) -> None:
        self.do(self.machine.received(lane, message, self.agenda.now))

    def do(self, actions: list[Any]) -> None:
        turn = False
        for action in actions:
            match action:
                case Send(lane, message):
                    self.agenda.post(self.scene.message_s, self.lanes[lane].to_source, message)
                case Copy():
                    self._copying_until = max(self._copying_until, self.agenda.now) + self._copy_seconds(action)
                    self.agenda.at(self._copying_until + self.scene.link.latency, self._copied, action.transfer_id, action.seq)
                case TellOffered(name, tokens):
                    self._settle()
                    refused = self.scheduler.on_offer(name, tokens, self.agenda.now)
                    assert refused is None, "an offer is refused"
                    turn = True
                case TellNearlyDone(name):
                    self._settle()
                    self.scheduler.nearly_done(name, self.agenda.now)
                    turn = True
                case TellCommitted(name, first_tokens):
                    self._committed(name, first_tokens)
                case Attach(lane):
                    self.do(self.machine.attached(lane, self.agenda.now))
                case Fence() | TellFailed() | TellReleased() | _:
                    raise AssertionError(f"nothing breaks here, and yet {action}")
        if turn:
            self._turn()

    def _copied(self, transfer_id: str, seq: int) -> None:
        self.do(self.machine.copied(transfer_id, seq, None, self.agenda.now))

    def _copy_seconds(self, copy: Copy) -> float:
        """What is still to be copied when a piece is announced: if its blocks were lent while it was computed and the link overlaps, the
        last layer; else all of it."""
        scene, span = self.scene, copy.span
        share = len(span.layers) / len(scene.groups)
        seconds = (span.stop - span.start) * scene.model.kv_token_bytes * share / scene.link.bytes_per_s
        life = scene.lives[copy.transfer_id]
        early = life.granted is not None and self.agenda.now - life.granted > seconds
        return seconds / scene.model.layers if early and scene.link.overlap else seconds

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _turn(self, *, told: bool = True) -> None:
        """Grants, then a round, as the loop does it. `told`: what the worker reports is not what it was; where only tokens have come, its
        next report that has more to say tells how the memory has grown."""
        granted = self._grant(self.scheduler.grants(self.agenda.now))
        rows = self.scheduler.rows
        if told or granted or rows != self._rows:
            self.changed()
        self._rows = rows
        if not self._busy:
            if self._begin():
                self.changed()
        elif self._cut is not None:
            self._go_on(*self._cut, self.scheduler.steady())

    def _grant(self, made: list[tuple[str, tuple[GroupGrant, ...]]]) -> bool:
        for name, blocks in made:
            self.scene.lives[name].granted = self.agenda.now
            self.do(self.machine.grant(name, blocks, self.agenda.now))
        return bool(made)

    def _begin(self) -> bool:
        """Start the next round. Whether somebody is given memory by it, or reads a prompt."""
        if count := self.scheduler.steady():
            self._start(self._stretch_from(self.agenda.now, count).times.seconds(count))
            return False
        granted = self._decide()
        works = [self._work(decision) for decision in self._flying]
        if works:
            self._start(self._round_seconds(works))
        return granted or any(work.tokens for work in works)

    def _decide(self) -> bool:
        """All steps of a round; whether there were grants by the way."""
        while len(self._flying) < self.hardware.pp and (decision := self.scheduler.decide(self.agenda.now)) is not None:
            self._flying.append(decision)
        self._joined = []
        return self._grant(self.scheduler.new_grants())

    def _start(self, seconds: float) -> None:
        self._busy, self._began = True, self.agenda.now
        self._round += 1
        self.agenda.after(seconds, self._over, self._round)
        if self.place is not None:
            self.place.begin()

    def repaced(self) -> None:
        """From the next round on."""
        self._settle()
        if self._cut is not None:
            self._go_on(*self._cut, 0)

    def _stretch_from(self, begun: float, count: int) -> Stretch:
        rows = self.scheduler.rows
        self._stretch = Stretch(begun, count, rows, self._pace(rows).rounds(self.scheduler.context))
        return self._stretch

    def _settle(self) -> None:
        """A message has come: of a stretch the rounds that have begun by now are made, and the last of them goes on."""
        if (stretch := self._stretch) is None:
            return
        self._stretch, begun = None, stretch.begun_by(self.agenda.now)
        if begun:
            self._make(stretch, begun)
        self._cut = stretch.after(begun), stretch.after(stretch.count)

    def _go_on(self, begins: float, over: float, count: int) -> None:
        """So many steady rounds follow the one that runs, from `begins` on; often they are those of the stretch that was cut."""
        self._cut = None
        ends = self._stretch_from(begins, count).after(count) if count else begins
        if ends != over:
            self._round += 1
            self.agenda.at(ends, self._over, self._round)

    def _make(self, stretch: Stretch, rounds: int) -> None:
        for life in self._joined:
            life.second = stretch.after(1)
        self._joined = []
        self._ending = self.scheduler.advance(rounds, TOKEN)
        self._itl.add_rising(stretch.times.first, stretch.times.more, rounds, stretch.rows)
        self.course.computed(stretch.begun, stretch.times.seconds(rounds))

    def _over(self, number: int) -> None:
        """The round by that number has ended, if it is still that which runs."""
        if number != self._round:
            return
        self._busy = False
        if (stretch := self._stretch) is not None:
            self._stretch = None
            self._make(stretch, stretch.count)
        self._turn(told=self._complete())
        if self.place is not None and not self._busy:
            self.place.end()

    def _complete(self) -> bool:
        """The steps in flight, or the last round of a stretch, have run; whether some have ended."""
        seconds, rows, ended = self.agenda.now - self._began, 0, self._ending
        if ended:
            self._ending = False
            self._take(self.scheduler.retire())
        flying, self._flying = self._flying, []
        if flying:
            self.course.computed(self._began, seconds)
        for decision in flying:
            outcome = self.scheduler.complete(output_of(decision.batch), self.agenda.now)
            for new in outcome.new_tokens:
                rows += 1
                self._written(self.scene.lives[new.attempt_id])
            ended |= self._take(outcome)
        if rows:
            self._itl.add(seconds, rows)
        return ended

    def _written(self, life: Life) -> None:
        """A token of it: perhaps its first, read and written here, or its second."""
        if life.first is None:
            self.opened(0, -life.arrival.prompt_tokens)
            self.course.queued.add(self.agenda.now - life.arrival.at)
            self.scene.told.first_token(life.name, self.agenda.now, last=False)
            if life.arrival.output_tokens > 1:
                self._joined.append(life)
        elif life.second is None:
            life.second = self.agenda.now

    def _take(self, outcome: DecodeOutcome) -> bool:
        for finished in outcome.finished:
            self.opened(-1, 0)
            self.scene.told.ended(finished.attempt_id, self.agenda.now)
        return bool(outcome.finished)

    def _round_seconds(self, works: list[Work]) -> float:
        """Steps follow each other through the stages. Where no prompt is read it is a round as in a stretch."""
        rows, stages = sum(work.rows for work in works), self.hardware.pp
        if not any(work.tokens for work in works):
            return self._pace(rows).rounds(sum(work.context for work in works)).first
        times = self.times(rows)
        each = [step_seconds(times, work, stages) for work in works]
        return max(*each, sum(each) / stages) if len(each) > 1 else each[0]

    def _pace(self, sequences: int) -> Pace:
        """Reckoned once as long as the times are the same."""
        if (times := self.times(sequences)) is not self._timed:
            self._timed, self._paces = times, {}
        if (pace := self._paces.get(sequences)) is None:
            pace = self._paces[sequences] = Pace.of(times, sequences, self.hardware.pp)
        return pace

    def _work(self, decision: Decision) -> Work:
        """A row computes a part of a prompt if it is long, or stands within one."""
        lives = self.scene.lives
        rows = zip(decision.attempts, decision.batch.rows, strict=True)
        return work_of(decision.batch, [row.length > 1 or row.start + 1 < lives[name].arrival.prompt_tokens for name, row in rows])
