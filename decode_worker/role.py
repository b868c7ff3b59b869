"""The decode role: joins the scheduler to the destination of transfers and to the routers' streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from ..core.clock import Clock
from ..core.commands import Command, Decode, Failed, Movable, Stop
from ..core.errors import Cancelled, DiptychError, InvalidRequest, TransferFailed, Unavailable
from ..core.fleet import WorkerReport, WorkerState
from ..core.request import Token
from ..core.stages import Stage
from ..core.transfer import GroupGrant, RefusedReason
from ..engine.batch import StepOutput
from ..kv_transfer.events import DestinationEvents
from ..rpc.lane import Lane
from ..worker.admit import refusal
from ..worker.attempts import Attempts
from ..worker.journal import Journal
from ..worker.loop import Inbox, OnLayer, StepTimes
from ..worker.outbox import Listener, Outbox
from ..worker.report import Reporter
from ..worker.timeline import stamp, stamping
from .choices import DecodeOutcome
from .decision import Decision
from .scheduler import DecodeScheduler
from .waits import Waits

REFUSALS = {
    RefusedReason.CLOSED: "The attempt is closed here.",
    RefusedReason.FAILED: "The prompt offered is not the one this attempt asks for.",
    RefusedReason.NO_MEMORY: "The prompt can never fit this worker's pool.",
}


class Transfers(Protocol):
    """What the role asks of `kv_transfer.destination.Destination`, on the asyncio thread."""

    def expect(self, transfer_id: str) -> None: ...
    def grant(self, transfer_id: str, groups: tuple[GroupGrant, ...]) -> None: ...
    def refuse(self, transfer_id: str, reason: RefusedReason, message: str) -> None: ...
    def cancel(self, transfer_id: str) -> None: ...
    async def serve_lane(self, lane: Lane) -> None: ...
    def check(self) -> None: ...
    async def close(self) -> None: ...

    @property
    def leases(self) -> int: ...


class DecodeRole:
    """`worker.loop.Role` and `worker.face.Commanded` of a decode worker; everything on the loop's thread."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        *,
        vocab_size: int,
        reporter: Reporter,
        clock: Clock,
        inbox: Inbox,
        destination: Callable[[DestinationEvents], Transfers],
    ) -> None:
        """`destination` makes the transfers' end from the events it shall call."""
        self.outbox = Outbox()
        self._scheduler, self._clock, self._reporter, self._vocab_size = scheduler, clock, reporter, vocab_size
        self._journal = Journal(clock)
        self._attempts = Attempts(self.outbox, self._journal.ended)
        self._draining = False
        self._waits = Waits()
        self._fresh: set[str] = set()
        """Committed, and no step of theirs has completed yet: their start is still to be stamped."""
        self.transfers = destination(_Events(self, inbox))

    # What routers say.

    def command(self, listener: Listener, command: Command) -> None:
        match command:
            case Decode():
                self._decode(listener, command)
            case Stop():
                if self._attempts.belongs(command.attempt_id, listener):
                    self._stop(command)
            case _:
                error = InvalidRequest("This is a decode worker: it hands no KV over.")
                self.outbox.say(listener, Failed(command.attempt_id, error))

    def detached(self, listener: Listener) -> None:
        for attempt_id in self._attempts.forget(listener):
            self._journal.lost(attempt_id)
            self._drop(attempt_id)

    def drain(self) -> None:
        if not self._draining:
            self._draining = self.outbox.wants_report = True
            for attempt_id in self._scheduler.movable():
                self._attempts.tell(Movable(attempt_id))

    def _decode(self, listener: Listener, decode: Decode) -> None:
        try:
            if self._draining:
                raise Unavailable("This worker takes nothing new: it is draining.")
            if (error := refusal(decode.request, self._vocab_size)) is not None:
                raise error
            self._scheduler.expect(decode, self._clock.now())
        except DiptychError as error:
            self.outbox.say(listener, Failed(decode.attempt_id, error))
            return
        self._attempts.open(decode.attempt_id, listener)
        self._journal.opened(decode.attempt_id, decode.request)
        if decode.local_prefill:
            self._waits.arrived(decode.attempt_id, self._clock.now())
        else:
            self.outbox.call(partial(self.transfers.expect, decode.attempt_id))

    def _stop(self, stop: Stop) -> None:
        if stop.choice is None:
            self._fail(stop.attempt_id, Cancelled("The router stopped this attempt."))
        else:
            self._tell(self._scheduler.stop(stop.attempt_id, stop.choice, self._clock.now()))

    def _fail(self, attempt_id: str, error: DiptychError) -> None:
        self._attempts.end(Failed(attempt_id, error))
        self._drop(attempt_id)

    def _drop(self, attempt_id: str) -> None:
        """Compute no more of it; a transfer under way ends at the destination, and `released` (or a faster commit) follows."""
        self._fresh.discard(attempt_id)
        self._waits.forget(attempt_id)
        if self._scheduler.cancel(attempt_id, self._clock.now()):
            self.outbox.call(partial(self.transfers.cancel, attempt_id))

    # What the engine does.

    def settle(self) -> None:
        self._grant(self._scheduler.grants(self._clock.now()))

    def _grant(self, grants: list[tuple[str, tuple[GroupGrant, ...]]]) -> None:
        for transfer_id, groups in grants:
            stamp(Stage.GRANTED, transfer_id, self._clock.now())
            self.outbox.call(partial(self.transfers.grant, transfer_id, groups))

    def decide(self) -> Decision | None:
        decision = self._scheduler.decide(self._clock.now())
        self._grant(self._scheduler.new_grants())
        if decision is not None:
            self._waits.began(decision.attempts, self._clock.now())
        return decision

    def join(self, decision: Decision) -> Decision | None:
        joined = self._scheduler.join(decision)
        self._grant(self._scheduler.new_grants())
        if joined is not None:
            self._waits.began(joined.attempts[len(decision.attempts) :], self._clock.now())
        return joined

    def on_layer(self, decision: Decision) -> OnLayer | None:
        return None

    def complete(self, decision: Decision, output: StepOutput, times: StepTimes) -> None:
        for attempt_id in self._fresh.intersection(decision.attempts):
            self._fresh.discard(attempt_id)
            stamp(Stage.DECODE_STARTED, attempt_id, times.began)
        if output.eager:
            self._reporter.count("diptych_worker_eager_steps_total")
        self._tell(self._scheduler.complete(output, self._clock.now()))

    def _tell(self, outcome: DecodeOutcome) -> None:
        for tokens in outcome.new_tokens:
            queued = self._waits.take(tokens.attempt_id)
            self._attempts.tell(tokens if queued is None else replace(tokens, queued=queued))
        for choice in outcome.choices:
            self._attempts.tell(choice)
        for finished in outcome.finished:
            self._fresh.discard(finished.attempt_id)
            self._waits.forget(finished.attempt_id)
            self._attempts.end(finished)
            stamp(Stage.FINISHED, finished.attempt_id, self._clock.now())

    def abandon(self, decision: Decision, error: DiptychError) -> None:
        for attempt_id in (*decision.attempts, *decision.forked):
            self._fail(attempt_id, error)
        self._scheduler.complete(StepOutput(decision.batch.step, ((),) * len(decision.batch.rows)), self._clock.now())

    # What the destination says.

    def offered(self, transfer_id: str, prompt_tokens: int) -> None:
        stamp(Stage.OFFERED, transfer_id, self._clock.now())
        reason = self._scheduler.on_offer(transfer_id, prompt_tokens, self._clock.now())
        if reason is None:
            return
        self._reporter.refused(reason)
        self.outbox.call(partial(self.transfers.refuse, transfer_id, reason, REFUSALS[reason]))
        self.transfer_failed(transfer_id, TransferFailed(REFUSALS[reason]))

    def nearly_done(self, transfer_id: str) -> None:
        self._scheduler.nearly_done(transfer_id, self._clock.now())

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], lacking: tuple[int, ...]) -> None:
        opening = self._scheduler.opening(transfer_id)
        if opening is not None and tuple(token.choice for token in first_tokens) != opening:
            self._fail(transfer_id, TransferFailed(f"The Commit brings {len(first_tokens)} first tokens; choices {opening} each need one."))
        if stamping() and transfer_id in self._attempts:
            stamp(Stage.COMMITTED, transfer_id, self._clock.now())
            self._fresh.add(transfer_id)
        self._tell(self._scheduler.committed(transfer_id, first_tokens, self._clock.now(), lacking))

    def transfer_failed(self, transfer_id: str, error: DiptychError) -> None:
        if not self._scheduler.transfer_failed(transfer_id, self._clock.now()):
            return
        if self._attempts.end(Failed(transfer_id, error)) and not isinstance(error, Cancelled):
            self._reporter.count("diptych_worker_transfers_failed_total")

    def released(self, transfer_id: str) -> None:
        self._scheduler.fenced(transfer_id, self._clock.now())

    # What the worker says of itself.

    def report(self) -> WorkerReport:
        state = WorkerState.DRAINING if self._draining else WorkerState.READY
        scheduler = self._scheduler
        return self._reporter.report(state, scheduler.load(self._clock.now()), scheduler.counters, scheduler.measures())

    def idle(self) -> bool:
        return not self._attempts and self._scheduler.load(self._clock.now()).leases == 0

    def check(self, *, idle: bool) -> None:
        self._scheduler.check()
        self.outbox.call(self.transfers.check)
        self._reporter.checked(self._scheduler.load(self._clock.now()), idle=idle)


class _Events:
    """`DestinationEvents` on the asyncio thread, passed on to the role's."""

    def __init__(self, role: DecodeRole, inbox: Inbox) -> None:
        self._role, self._inbox = role, inbox

    def offered(self, transfer_id: str, prompt_tokens: int) -> None:
        self._inbox.put(partial(self._role.offered, transfer_id, prompt_tokens))

    def nearly_done(self, transfer_id: str) -> None:
        self._inbox.put(partial(self._role.nearly_done, transfer_id))

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], kv_bytes: int, seconds: float, lacking: tuple[int, ...]) -> None:
        self._inbox.put(partial(self._role.committed, transfer_id, first_tokens, lacking))

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        self._inbox.put(partial(self._role.transfer_failed, transfer_id, error))

    def released(self, transfer_id: str) -> None:
        self._inbox.put(partial(self._role.released, transfer_id))
