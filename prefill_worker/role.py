"""The prefill role: joins the scheduler to the source of transfers and to the routers' streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from ..core.clock import Clock
from ..core.commands import Command, Failed, HandedOver, Movable, Prefill, Stop
from ..core.errors import Cancelled, DiptychError, InvalidRequest, Unavailable
from ..core.fleet import WorkerReport, WorkerState
from ..core.request import Token
from ..core.stages import Stage
from ..engine.batch import StepOutput
from ..kv_transfer.events import SourceEvents
from ..worker.admit import refusal
from ..worker.attempts import Attempts
from ..worker.journal import Journal
from ..worker.loop import Inbox, OnLayer, StepTimes
from ..worker.outbox import Listener, Outbox
from ..worker.report import Reporter
from ..worker.timeline import stamp, stamping
from .announcer import Announcer, Stretch, Tables
from .scheduler import Decision, PrefillScheduler


class Transfers(Protocol):
    """What the role asks of `kv_transfer.source.Source`, on the asyncio thread."""

    def offer(self, transfer_id: str, destination_address: str, prompt_tokens: int) -> None: ...
    def computed(self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: Tables, rank: int = 0) -> None: ...
    def commit(self, transfer_id: str, first_tokens: tuple[Token, ...]) -> None: ...
    def cancel(self, transfer_id: str, reason: str) -> None: ...
    def together(self, positions: int) -> int: ...
    def check(self) -> None: ...
    async def close(self) -> None: ...

    @property
    def leases(self) -> int: ...


class PrefillRole:
    """`worker.loop.Role` and `worker.face.Commanded` of a prefill worker; everything on the loop's thread."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        *,
        layers: Sequence[tuple[int, ...]],
        vocab_size: int,
        reporter: Reporter,
        clock: Clock,
        inbox: Inbox,
        call_soon: Callable[[Callable[[], None]], None],
        source: Callable[[SourceEvents], Transfers],
    ) -> None:
        """`layers` that each rank of this worker holds. `source` makes the transfers' end from the events it shall call."""
        self.outbox = Outbox()
        self._scheduler, self._clock, self._reporter = scheduler, clock, reporter
        self._vocab_size, self._layers = vocab_size, layers
        self._journal = Journal(clock)
        self._attempts = Attempts(self.outbox, self._journal.ended)
        self._draining = False
        self._offered: set[str] = set()
        self._drawn: dict[str, float] = {}
        """When the first tokens were drawn of what is being handed over."""
        self.transfers = source(_Events(self, inbox))
        self._call_soon = call_soon

    # What routers say.

    def command(self, listener: Listener, command: Command) -> None:
        match command:
            case Prefill():
                self._prefill(listener, command)
            case Stop():
                # A single choice has a text only once its first token is told, and then nothing of it is computed here.
                if command.choice is None and self._attempts.belongs(command.attempt_id, listener):
                    self._fail(command.attempt_id, Cancelled("The router stopped this attempt."))
            case _:
                error = InvalidRequest("This is a prefill worker: it writes no answers.")
                self.outbox.say(listener, Failed(command.attempt_id, error))

    def detached(self, listener: Listener) -> None:
        for attempt_id in self._attempts.forget(listener):
            self._journal.lost(attempt_id)
            self._drop(attempt_id, "the router is gone")

    def drain(self) -> None:
        if not self._draining:
            self._draining = self.outbox.wants_report = True
            self._let_go(self._scheduler.movable())

    def _let_go(self, attempt_ids: Iterable[str]) -> None:
        """This worker leaves: the router may have these done elsewhere."""
        for attempt_id in attempt_ids:
            self._attempts.tell(Movable(attempt_id))

    def _prefill(self, listener: Listener, prefill: Prefill) -> None:
        try:
            if self._draining:
                raise Unavailable("This worker takes nothing new: it is draining.")
            if (error := refusal(prefill.request, self._vocab_size)) is not None:
                raise error
            self._scheduler.add(prefill, self._clock.now())
        except DiptychError as error:
            self.outbox.say(listener, Failed(prefill.attempt_id, error))
            return
        self._attempts.open(prefill.attempt_id, listener)
        self._journal.opened(prefill.attempt_id, prefill.request)
        stamp(Stage.PREFILL_QUEUED, prefill.attempt_id, self._clock.now())

    def _fail(self, attempt_id: str, error: DiptychError) -> None:
        self._attempts.end(Failed(attempt_id, error))
        self._drop(attempt_id, error.message)

    def _drop(self, attempt_id: str, reason: str) -> None:
        """Compute no more of it; what was offered ends at the source, and `released` follows."""
        if self._scheduler.cancel(attempt_id, self._clock.now()):
            self.outbox.call(partial(self.transfers.cancel, attempt_id, reason))

    # What the engine does.

    def settle(self) -> None:
        return None

    def decide(self) -> Decision | None:
        decision = self._scheduler.decide(self._clock.now())
        if decision is None:
            return None
        for started in decision.started:
            stamp(Stage.PREFILL_STARTED, started.attempt_id, self._clock.now())
            if started.destination is None:
                continue
            self._offered.add(started.attempt_id)
            self.outbox.call(partial(self.transfers.offer, started.attempt_id, started.destination, started.prompt_tokens))
            for rank, layers in enumerate(self._layers) if started.cached_tokens else ():
                cached = partial(self.transfers.computed, started.attempt_id, layers, 0, started.cached_tokens, started.tables, rank)
                self.outbox.call(cached)
        return decision

    def join(self, decision: Decision) -> None:
        """A prompt that comes has its turn behind those that are here."""

    def on_layer(self, decision: Decision) -> OnLayer | None:
        rows = zip(decision.attempts, decision.batch.rows, strict=True)
        stretches = tuple(
            Stretch(attempt_id, row.start, row.start + row.length, row.tables) for attempt_id, row in rows if attempt_id in self._offered
        )
        if not stretches:
            return None
        together = self.transfers.together(max(stretch.stop - stretch.start for stretch in stretches))
        announcers = [
            Announcer(stretches, self.transfers.computed, self._call_soon, layers=len(layers), together=together, rank=rank)
            for rank, layers in enumerate(self._layers)
        ]

        def stored(layer: int, rank: int = 0) -> None:
            announcers[rank].stored(layer)

        return self._stamped(stored, decision) if stamping() else stored

    def _stamped(self, announce: OnLayer, decision: Decision) -> OnLayer:
        drawing = [a for a, row in zip(decision.attempts, decision.batch.rows, strict=True) if row.draws]
        last = self._layers[-1][-1], len(self._layers) - 1

        def stored(layer: int, rank: int = 0) -> None:
            announce(layer, rank)
            if (layer, rank) == last:
                for attempt_id in drawing:
                    stamp(Stage.KV_STORED, attempt_id, self._clock.now())

        return stored

    def complete(self, decision: Decision, output: StepOutput, times: StepTimes) -> None:
        outcome = self._scheduler.complete(output, self._clock.now())
        complete = {finished.attempt_id for finished in outcome.finished}
        for first in outcome.first_tokens:
            stamp(Stage.FIRST_TOKEN, first.attempt_id, times.ended)
            self._attempts.tell(first)
            self._journal.first(first)
            if first.attempt_id not in complete:
                self._drawn[first.attempt_id] = times.ended
                self.outbox.call(partial(self._commit, first.attempt_id, first.tokens))
        for finished in outcome.finished:
            self._attempts.end(finished)
            if finished.attempt_id in self._offered:
                self.outbox.call(partial(self.transfers.cancel, finished.attempt_id, "the first token ended every choice"))
        if self._draining:
            movable = set(self._scheduler.movable())
            self._let_go(first.attempt_id for first in outcome.first_tokens if first.attempt_id in movable)

    def _commit(self, transfer_id: str, first_tokens: tuple[Token, ...]) -> None:
        """On the asyncio thread."""
        self.transfers.commit(transfer_id, first_tokens)
        stamp(Stage.COMMIT_SENT, transfer_id, self._clock.now())

    def abandon(self, decision: Decision, error: DiptychError) -> None:
        for attempt_id in decision.attempts:
            self._fail(attempt_id, error)
        self._scheduler.complete(StepOutput(decision.batch.step, ((),) * len(decision.batch.rows)), self._clock.now())

    # What the source says.

    def granted(self, transfer_id: str) -> None:
        stamp(Stage.GRANTED, transfer_id, self._clock.now())
        self._scheduler.granted(transfer_id)

    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None:
        exposed = max(0.0, self._clock.now() - self._drawn.get(transfer_id, self._clock.now()))
        self._attempts.end(HandedOver(transfer_id, kv_bytes, seconds, transport, exposed))

    def transfer_failed(self, transfer_id: str, error: DiptychError) -> None:
        self._scheduler.cancel(transfer_id, self._clock.now())
        if self._attempts.end(Failed(transfer_id, error)) and not isinstance(error, Cancelled):
            self._reporter.count("diptych_worker_transfers_failed_total")

    def released(self, transfer_id: str) -> None:
        self._offered.discard(transfer_id)
        self._drawn.pop(transfer_id, None)
        self._scheduler.release(transfer_id, self._clock.now())

    def turned_away(self) -> None:
        self._reporter.count("diptych_worker_pool_refusals_total")

    # What the worker says of itself.

    def report(self) -> WorkerReport:
        state = WorkerState.DRAINING if self._draining else WorkerState.READY
        scheduler = self._scheduler
        return self._reporter.report(state, scheduler.load(self._clock.now()), scheduler.counters, scheduler.measures())

    def idle(self) -> bool:
        return not self._attempts and not self._offered and self._scheduler.load(self._clock.now()).leases == 0

    def check(self, *, idle: bool) -> None:
        self._scheduler.check()
        self.outbox.call(self.transfers.check)
        self._reporter.checked(self._scheduler.load(self._clock.now()), idle=idle)


class _Events:
    """`SourceEvents` on the asyncio thread, passed on to the role's."""

    def __init__(self, role: PrefillRole, inbox: Inbox) -> None:
        self._role, self._inbox = role, inbox

    def granted(self, transfer_id: str) -> None:
        self._inbox.put(partial(self._role.granted, transfer_id))

    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None:
        self._inbox.put(partial(self._role.handed_over, transfer_id, kv_bytes, seconds, transport))

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        self._inbox.put(partial(self._role.transfer_failed, transfer_id, error))

    def released(self, transfer_id: str) -> None:
        self._inbox.put(partial(self._role.released, transfer_id))

    def turned_away(self) -> None:
        self._inbox.put(self._role.turned_away)
