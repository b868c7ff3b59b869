"""A simulated prefill worker: the production scheduler and source machine, steps that take the profile's time. Pure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...core.commands import Prefill
from ...core.request import FinishReason
from ...core.transfer import LaneMessage
from ...kv_transfer.actions import Dial, Fence, Send, TellFailed, TellGranted, TellHandedOver, TellReleased
from ...kv_transfer.source_machine import SourceMachine
from ...prefill_worker.scheduler import Decision, PrefillScheduler
from .lane import Lane
from .latency import Work, step_seconds
from .life import Life, hashes_of
from .profile import Hardware
from .sharing import Paced
from .worker import SLOTS, Scene, Worker, output_of, work_of


class PrefillWorker(Worker):
    """`dial`: opens a lane to the decode worker of that name, for this worker by that number."""

    def __init__(self, scene: Scene, hardware: Hardware, name: str, number: int, dial: Callable[[PrefillWorker, int, str], Lane]) -> None:
        super().__init__(scene, hardware, name, number)
        policies = scene.policies
        self.scheduler = PrefillScheduler(
            self.pool,
            hashes_of=hashes_of,
            chunk_tokens=policies.chunk_tokens,
            max_running=policies.prefill_running,
            max_context=scene.model.max_context,
            eos_token_ids=(),
        )
        self.machine = SourceMachine(self.hello, policies.lease_s, SLOTS)
        self._dial = dial
        self._lanes: dict[int, Lane] = {}
        self._layers = tuple(range(len(scene.groups)))
        self._depth = hardware.pp + 1
        self._flying = 0
        self._free_at = self._last_ends = 0.0
        self._paced = None if self.place is None else Paced(self.agenda, self.place)
        self.changed()

    def add(self, life: Life, destination: str | None) -> None:
        self.opened(1, life.arrival.prompt_tokens)
        self.scheduler.add(Prefill(life.name, life.request, destination), self.agenda.now)
        self._pump()
        self.changed()

    def _pump(self) -> bool:
        """Decide what can be decided; it runs when the first stage is free. Whether there was anything."""
        decided = False
        while self._flying < self._depth and (decision := self.scheduler.decide(self.agenda.now)) is not None:
            self._flying += 1
            decided = True
            work = work_of(decision.batch, (True,) * len(decision.batch.rows))
            for started in decision.started:
                if started.destination is not None:
                    self.do(self.machine.offer(started.attempt_id, started.destination, started.prompt_tokens, self.agenda.now))
                    self.watch_leases()
                    if started.cached_tokens:
                        self._computed(started.attempt_id, 0, started.cached_tokens, started.tables)
            if self._paced is None:
                self.agenda.at(self._ends(work), self._ran, decision)
            else:
                self._paced.add(work, partial(self._ran_paced, decision))
        return decided

    def _ends(self, work: Work) -> float:
        """When a step that is decided now has gone through all stages; none passes another within the pipeline."""
        seconds, stages = step_seconds(self.hardware.times, work, self.hardware.pp), self.hardware.pp
        begins = max(self.agenda.now, self._free_at)
        self._free_at = begins + seconds / stages
        self._last_ends = max(begins + seconds, self._last_ends + seconds / stages)
        self.course.computed(begins, seconds / stages)
        return self._last_ends

    def repaced(self) -> None:
        """The step that runs, too."""
        if self._paced is not None:
            self._paced.changed()

    def _ran_paced(self, decision: Decision, seconds: float) -> None:
        self.course.computed(self.agenda.now - seconds, seconds)
        self._ran(decision)

    def _ran(self, decision: Decision) -> None:
        self._flying -= 1
        for name, row in zip(decision.attempts, decision.batch.rows, strict=True):
            self._computed(name, row.start, row.start + row.length, row.tables)
        outcome = self.scheduler.complete(output_of(decision.batch), self.agenda.now)
        for first in outcome.first_tokens:
            name = first.attempt_id
            self.course.queued.add(first.queued)
            ends = all(finish is FinishReason.LENGTH for finish in first.finishes)
            life = self.scene.lives[name]
            self.opened(-1, -life.arrival.prompt_tokens)
            self.scene.told.first_token(name, self.agenda.now, last=ends)
            if not ends:
                self.do(self.machine.commit(name, first.tokens, self.agenda.now))
        self._pump()
        self.changed()

    def _computed(self, name: str, start: int, stop: int, tables: tuple[tuple[int, ...], ...]) -> None:
        if self.machine.computed(name, self._layers, start, stop, tables):
            self.do(self.machine.announce(self.agenda.now))

    def received(self, lane: int, message: LaneMessage) -> None:
        self.do(self.machine.received(lane, message, self.agenda.now))

    def do(self, actions: list[Any]) -> None:
        freed = released = False
        for action in actions:
            match action:
                case Send(lane, message):
                    self.agenda.post(self.scene.message_s, self._lanes[lane].to_destination, message)
                case TellGranted(name):
                    self.scheduler.granted(name)
                    freed = True
                case Fence(name):
                    self.do(self.machine.fenced(name, self.agenda.now))
                case TellReleased(name):
                    self.scheduler.release(name, self.agenda.now)
                    freed = released = True
                case TellHandedOver():
                    pass
                case Dial(lane, address):
                    self._lanes[lane] = self._dial(self, lane, address)
                    self.do(self.machine.dialled(lane, self.agenda.now))
                case TellFailed(name, error):
                    raise AssertionError(f"nothing breaks here, and yet the transfer of {name} fails: {error.message}")
                case _:
                    raise AssertionError(f"nothing breaks here, and yet {action}")
        if freed and (self._pump() or released):
            self.changed()
