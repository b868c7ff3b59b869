"""The engine loop: one thread that owns a role's scheduler, one thread that runs the engine.

Policy as etcd's raft draws it, *decide, submit, apply*: while the engine computes step k the loop decides step k + 1, so that the
engine never waits for Python between two steps; what comes before the engine has taken it joins it. Nothing polls: the loop sleeps on
its inbox, the engine thread on its queue. On a GPU the engine thread only launches a step, and another waits for its output
(look_ahead.py).

    asyncio ──post──▶ inbox ──▶ loop ──step──▶ engine thread
       ▲                        │ ▲                 │
       └── one delivery a turn ─┘ └── ran / failed ─┘
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from ..core.clock import Clock
from ..core.errors import DiptychError, Internal
from ..core.fleet import WorkerReport
from ..core.recordings import Doing
from ..core.spans import span
from ..engine.batch import Batch, StepOutput
from .lending import Lending
from .outbox import Call, Delivery, Outbox

DEPTH = 2
"""Steps decided and not yet completed, at an engine of one stage: one runs, one waits behind it."""
STEADY_REPORT_S = 0.25
"""While steps end and begin a report is made no more often, unless it is wanted: twenty a second, with the messages that tell them, took
1 % of a decode worker's core."""
CHECK_EVERY_S = 0.1
"""How often the books are checked while there is work, if they are checked at all (tests): at 0.5 ms each, half a percent of the time."""
BROKEN_AFTER = 3
"""Failed steps in a row after which an engine counts as broken and the process ends."""

Inbox = SimpleQueue[Call]
"""Calls to be made on the loop's thread; put into it from any thread, which never blocks."""
Ran = Callable[[StepOutput | Exception], None]
"""Takes what has come of a step: its output, or what it failed by."""

log = logging.getLogger(__name__)


class OnLayer(Protocol):
    """Called when `rank` has stored a layer's KV of a step: by the engine's thread for this rank, 0, by one thread for each other."""

    def __call__(self, layer: int, rank: int = 0) -> None: ...


RunStep = Callable[[Batch, OnLayer | None, Ran], None]
"""Computes a batch; what comes of it is given to the third argument on any thread, now or later, in the order of the steps. May raise
instead, if nothing is still to come of a step before it."""


def at_once(run: Callable[[Batch, OnLayer | None], StepOutput]) -> RunStep:
    """An engine whose output is there when it returns."""
    return lambda batch, on_layer, ran: ran(run(batch, on_layer))


class HasBatch(Protocol):
    """What the loop needs of a decision."""

    @property
    def batch(self) -> Batch: ...

    @property
    def attempts(self) -> tuple[str, ...]:
        """Whose its rows are."""
        ...


D = TypeVar("D", bound=HasBatch)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When the engine began and ended a step, in seconds of the loop's clock. One that was launched behind another was begun when it was
    launched: its device came to it when the other ended."""

    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class _Submitted(Generic[D]):
    """A step for the engine. `after_rest`: there was nothing to compute before it."""

    decision: D
    on_layer: OnLayer | None
    after_rest: bool


class Role(Protocol[D]):
    """A phase's policy joined to its transfers. All calls come from the loop's thread, but for the one `on_layer` returns."""

    outbox: Outbox

    def settle(self) -> None:
        """What follows from the messages of this turn, taken together (grants); before any decision."""
        ...

    def decide(self) -> D | None:
        """The next step, or None if there is nothing to compute now."""
        ...

    def join(self, decision: D) -> D | None:
        """The step decided last, which the engine has not begun, with what has come since; None if that stays as it is."""
        ...

    def on_layer(self, decision: D) -> OnLayer | None:
        """What is to be called when a layer's KV of this step is stored; None if nobody wants to know."""
        ...

    def complete(self, decision: D, output: StepOutput, times: StepTimes) -> None: ...

    def abandon(self, decision: D, error: DiptychError) -> None:
        """The step failed: so did every attempt in it."""
        ...

    def report(self) -> WorkerReport: ...

    def idle(self) -> bool:
        """Nothing is waiting, running or being handed over."""
        ...

    def check(self, *, idle: bool) -> None:
        """Raise if the books are wrong. `idle`: nothing may be held."""
        ...


class EngineLoop(Generic[D]):
    """Runs `role` over an engine (`run`) until stopped; with `check` its books are checked, always when idle and now and then when not.

    `lending`: of the cores that the engine computes on. `depth`: steps decided and not yet completed.
    `broken_after`: failed steps in a row after which it ends the process.
    `deliver` is called on the loop's thread, once a turn at most, and must only pass its argument on. `died` is called with the
    error, on the thread that met it, when the books or the engine can no longer be trusted; it must end the process.
    """

    def __init__(
        self,
        run: RunStep,
        role: Role[D],
        *,
        inbox: Inbox,
        clock: Clock,
        deliver: Callable[[Delivery], None],
        died: Callable[[BaseException], None],
        check: bool = False,
        depth: int = DEPTH,
        broken_after: int = BROKEN_AFTER,
        lending: Lending | None = None,
    ) -> None:
        self._run_step, self._role, self._clock, self._deliver, self._died, self._check = run, role, clock, deliver, died, check
        self._inbox, self._depth, self._broken_after, self._lending = inbox, depth, broken_after, lending
        self._steps: SimpleQueue[_Submitted[D] | None] = SimpleQueue()
        self._in_flight = 0
        self._begun = self._over = 0
        """Steps that the engine thread has taken up, and those of which all has come."""
        self._resting = True
        """When last looked there was nothing to compute."""
        self._failures = 0
        self._ended = 0
        """Steps that this turn has heard the end of."""
        self._running = True
        self._reported: tuple[WorkerReport, bool] | None = None
        self._check_at = 0.0
        self._report_at = 0.0
        """Not before, while there is a step in flight."""
        self._threads = tuple(
            threading.Thread(target=self._guarded, args=(body,), name=name, daemon=True)
            for name, body in (("engine-loop", self._turns), ("engine", self._engine))
        )

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the steps in flight; blocks until both threads have ended."""
        self._inbox.put(self._stop)
        for thread in self._threads:
            thread.join()

    def _stop(self) -> None:
        self._running = False

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - whatever it is, this thread is lost and the process with it
            self._died(error)
        finally:
            self._steps.put(None)

    def _turns(self) -> None:
        self._flush()
        while self._running:
            first = self._inbox.get()
            with span(Doing.TURN):
                self._turn(first)

    def _turn(self, first: Call) -> None:
        self._ended = 0
        with span(Doing.HEAR):
            heard = self._hear(first)
            self._role.settle()
        self._tell()
        if heard > self._ended:
            self._join()
        while self._running and self._in_flight < self._depth and (decision := self._decide()) is not None:
            # Told before submitted: an attempt is offered before its first layer can be announced.
            self._tell()
            self._in_flight += 1
            self._steps.put(_Submitted(decision, self._role.on_layer(decision), self._resting))
            self._resting = False
        self._resting = not self._in_flight
        busy = self._reported is not None and not self._reported[1]
        if self._in_flight and busy and self._clock.now() < self._report_at and not self._role.outbox.wants_report:
            self._tell()  # another turn follows when the step under way has ended
        else:
            with span(Doing.REPORT):
                self._flush()

    def _join(self) -> None:
        """Have what has come go with the step that waits for the engine, if one does: it would have to wait for the one behind it."""
        if self._steps.qsize() != 1:
            return
        try:
            step = self._steps.get_nowait()
        except Empty:  # taken meanwhile
            return
        with span(Doing.DECIDE):
            joined = step and self._role.join(step.decision)
        self._tell()
        self._steps.put(replace(step, decision=joined) if step and joined else step)

    def _hear(self, first: Call) -> int:
        """Make the calls that have come, the first of which is there; how many they were."""
        first()
        heard = 1
        try:
            while True:
                self._inbox.get_nowait()()
                heard += 1
        except Empty:
            return heard

    def _decide(self) -> D | None:
        with span(Doing.DECIDE):
            return self._role.decide()

    def _tell(self) -> None:
        if self._role.outbox:
            with span(Doing.TELL):
                self._deliver(self._role.outbox.take())

    def _flush(self) -> None:
        """Tell what is left to say, and how the worker is if that has changed."""
        idle = self._in_flight == 0 and self._role.idle()
        if self._check and (idle or self._clock.now() >= self._check_at):
            self._role.check(idle=idle)
            self._check_at = self._clock.now() + CHECK_EVERY_S
        self._report_at = self._clock.now() + STEADY_REPORT_S
        report = self._role.report()
        if (report, idle) != self._reported or self._role.outbox:
            self._reported = report, idle
            self._deliver(self._role.outbox.take(report, idle=idle))

    def _engine(self) -> None:
        while (step := self._next()) is not None:
            decision, ran = step.decision, partial(self._ran, step.decision, self._clock.now())
            self._begun += 1
            with span(Doing.STEP, decision.batch.step, decision.attempts):
                try:
                    self._run_step(decision.batch, step.on_layer, ran)
                except Exception as error:  # noqa: BLE001 - any defect of the engine must end its attempts, not hang them
                    ran(error)

    def _next(self) -> _Submitted[D] | None:
        if self._lending is not None and self._steps.empty():
            self._lending.idle()
        with span(Doing.WAIT) as waiting:
            step = self._steps.get()
            if step is None or step.after_rest:
                waiting.rename(Doing.IDLE)
            elif self._begun > self._over:  # so nobody waited for the decision
                waiting.rename(Doing.UNDER_WAY)
        if self._lending is not None and step is not None:
            self._lending.busy(len(step.decision.batch.rows))
        return step

    def _ran(self, decision: D, began: float, outcome: StepOutput | Exception) -> None:
        self._over += 1
        if isinstance(outcome, Exception):
            self._inbox.put(partial(self._step_failed, decision, outcome))
        else:
            self._inbox.put(partial(self._step_ran, decision, outcome, StepTimes(began, self._clock.now())))

    def _step_ran(self, decision: D, output: StepOutput, times: StepTimes) -> None:
        self._in_flight -= 1
        self._failures = 0
        self._ended += 1
        with span(Doing.COMPLETE, output.step):
            self._role.complete(decision, output, times)

    def _step_failed(self, decision: D, error: Exception) -> None:
        self._in_flight -= 1
        self._failures += 1
        log.error("Step %d failed.", decision.batch.step, exc_info=error)
        if self._failures >= self._broken_after:
            what = f"{self._failures} steps in a row" if self._failures > 1 else "a step"
            raise Internal(f"The engine is broken: {what} failed.") from error
        self._role.abandon(decision, Internal(f"The engine failed: {type(error).__name__}: {error}"))
