"""The engine loop over a fake role and a fake engine: what it must do with every step, good or bad."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue

import pytest
from diptych.core.clock import MonotonicClock
from diptych.core.commands import Failed, StepEvents
from diptych.core.errors import DiptychError, Internal
from diptych.core.fleet import WorkerReport, WorkerState
from diptych.core.recordings import Doing
from diptych.core.spans import Recording
from diptych.engine.batch import Batch, Drawn, Row, StepOutput
from diptych.worker import loop
from diptych.worker.look_ahead import LookAhead
from diptych.worker.loop import BROKEN_AFTER, EngineLoop, Inbox, Ran, StepTimes, at_once
from diptych.worker.outbox import Delivery, Outbox

WAIT_S = 60.0


@dataclass(frozen=True)
class FakeDecision:
    batch: Batch
    attempts: tuple[str, ...] = ()


class Ear:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[StepEvents] = []

    def send(self, events: StepEvents) -> None:
        self.heard.append(events)


@dataclass
class FakeRole:
    """Wants `wanted` steps; notes what becomes of them."""

    wanted: int = 0
    tells_layers: bool = True
    late: tuple[str, ...] = ()
    """Who is to join the step that waits."""
    served: list[tuple[str, ...]] = field(default_factory=list)
    """Whose each step was."""
    decided: int = 0
    completed: list[int] = field(default_factory=list)
    abandoned: list[tuple[int, DiptychError]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    checks: list[bool] = field(default_factory=list)
    """Of each, whether it was idle."""
    outbox: Outbox = field(default_factory=Outbox)
    ear: Ear = field(default_factory=Ear)
    done: threading.Event = field(default_factory=threading.Event)

    def want(self, steps: int) -> None:
        self.done.clear()
        self.wanted += steps

    def settle(self) -> None:
        return None

    def decide(self) -> FakeDecision | None:
        if self.decided == self.wanted:
            return None
        self.decided += 1
        row = Row(slot=0, start=0, token_ids=(1,), tables=((0,),), draws=())
        return FakeDecision(Batch(self.decided - 1, (row,)))

    def join(self, decision: FakeDecision) -> FakeDecision | None:
        if not self.late:
            return None
        joined = replace(decision, attempts=(*decision.attempts, *self.late))
        self.late = ()
        return joined

    def on_layer(self, decision: FakeDecision) -> partial[None] | None:
        return partial(self.layers.append) if self.tells_layers else None

    def complete(self, decision: FakeDecision, output: StepOutput, times: StepTimes) -> None:
        assert output.step == decision.batch.step
        assert times.began <= times.ended
        self.completed.append(output.step)
        self.served.append(decision.attempts)
        self._ended()

    def abandon(self, decision: FakeDecision, error: DiptychError) -> None:
        self.abandoned.append((decision.batch.step, error))
        self.outbox.say(self.ear, Failed(str(decision.batch.step), error))
        self._ended()

    def _ended(self) -> None:
        if len(self.completed) + len(self.abandoned) == self.wanted:
            self.done.set()

    def report(self) -> WorkerReport:
        return WorkerReport("w", 1, WorkerState.READY, 0, self.wanted - len(self.completed), 0, 0, 0, 0)

    def idle(self) -> bool:
        return len(self.completed) + len(self.abandoned) == self.wanted

    def check(self, *, idle: bool) -> None:
        self.checks.append(idle)


class FakeEngine:
    """Runs a step when a permit is given; fails the steps named."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.started: SimpleQueue[int] = SimpleQueue()
        self.failing: set[int] = set()

    def run(self, batch: Batch, on_layer) -> StepOutput:
        self.started.put(batch.step)
        assert self.permits.acquire(timeout=WAIT_S)
        on_layer(batch.step)
        if batch.step in self.failing:
            raise ArithmeticError("the engine slipped")
        return StepOutput(batch.step, (Drawn(7),))


@dataclass
class Stage:
    role: FakeRole
    engine: FakeEngine
    inbox: Inbox
    deliveries: list[Delivery]
    deaths: SimpleQueue[BaseException]
    loop: EngineLoop[FakeDecision]


@pytest.fixture
def stage() -> Iterator[Stage]:
    role, engine, inbox = FakeRole(), FakeEngine(), SimpleQueue()
    deliveries: list[Delivery] = []
    deaths: SimpleQueue[BaseException] = SimpleQueue()
    loop: EngineLoop[FakeDecision] = EngineLoop(
        at_once(engine.run), role, inbox=inbox, clock=MonotonicClock(), deliver=deliveries.append, died=deaths.put, check=True
    )
    loop.start()
    yield Stage(role, engine, inbox, deliveries, deaths, loop)
    engine.permits.release(1000)
    loop.stop()


def test_the_next_step_is_decided_while_one_is_in_flight_and_no_more(stage: Stage) -> None:
    stage.inbox.put(partial(stage.role.want, 5))
    assert stage.engine.started.get(timeout=WAIT_S) == 0
    seen = threading.Event()
    stage.inbox.put(seen.set)  # behind the turn that submitted
    assert seen.wait(WAIT_S)
    assert stage.role.decided == 2
    stage.engine.permits.release(5)
    assert stage.role.done.wait(WAIT_S)
    assert stage.role.completed == [0, 1, 2, 3, 4]
    assert stage.role.layers == [0, 1, 2, 3, 4]


def test_what_comes_while_a_step_waits_goes_with_it(stage: Stage) -> None:
    stage.inbox.put(partial(stage.role.want, 3))
    assert stage.engine.started.get(timeout=WAIT_S) == 0
    seen = threading.Event()
    stage.inbox.put(partial(setattr, stage.role, "late", ("b",)))
    stage.inbox.put(seen.set)
    assert seen.wait(WAIT_S)
    stage.engine.permits.release(3)
    assert stage.role.done.wait(WAIT_S)
    assert stage.role.served == [(), ("b",), ()]


def test_a_failed_step_fails_its_attempts_and_the_loop_goes_on(stage: Stage) -> None:
    stage.engine.failing = {1}
    stage.engine.permits.release(4)
    stage.inbox.put(partial(stage.role.want, 4))
    assert stage.role.done.wait(WAIT_S)
    assert stage.role.completed == [0, 2, 3]
    ((step, error),) = stage.role.abandoned
    assert step == 1
    assert isinstance(error, Internal)
    assert "the engine slipped" in error.message
    stage.loop.stop()
    said = [event for delivery in stage.deliveries for _, events in delivery.events for event in events.events]
    assert said == [Failed("1", error)]


def test_an_engine_that_fails_again_and_again_ends_the_process(stage: Stage) -> None:
    stage.engine.failing = set(range(BROKEN_AFTER))
    stage.engine.permits.release(BROKEN_AFTER)
    stage.inbox.put(partial(stage.role.want, BROKEN_AFTER))
    error = stage.deaths.get(timeout=WAIT_S)
    assert isinstance(error, Internal)
    assert isinstance(error.__cause__, ArithmeticError)


@dataclass
class Pipeline:
    """An engine that has its outputs later: it keeps what takes them."""

    taken: SimpleQueue[tuple[int, Ran]] = field(default_factory=SimpleQueue)

    def run(self, batch: Batch, on_layer, ran: Ran) -> None:
        self.taken.put((batch.step, ran))


def test_outputs_may_come_later_and_as_many_steps_are_in_flight_as_asked_for() -> None:
    role, engine, inbox = FakeRole(), Pipeline(), SimpleQueue()
    loop: EngineLoop[FakeDecision] = EngineLoop(
        engine.run, role, inbox=inbox, clock=MonotonicClock(), deliver=lambda _: None, died=lambda _: None, depth=4
    )
    loop.start()
    inbox.put(partial(role.want, 6))
    flying = [engine.taken.get(timeout=WAIT_S) for _ in range(4)]
    seen = threading.Event()
    inbox.put(seen.set)
    assert seen.wait(WAIT_S)
    assert (role.decided, role.completed, engine.taken.empty()) == (4, [], True)
    for step in range(6):
        number, ran = flying.pop(0)
        assert number == step
        ran(StepOutput(number, (Drawn(7),)))
        if step < 2:
            flying.append(engine.taken.get(timeout=WAIT_S))
    assert role.done.wait(WAIT_S)
    assert role.completed == [0, 1, 2, 3, 4, 5]
    loop.stop()


class Gpu:
    """An engine that is launched: a step's output is there when a test has said so."""

    def __init__(self) -> None:
        self.launched: SimpleQueue[int] = SimpleQueue()
        self.computed: defaultdict[int, threading.Event] = defaultdict(threading.Event)
        self.unlaunchable: set[int] = set()
        self.failing: set[int] = set()

    def launch(self, batch: Batch, on_layer) -> Callable[[], StepOutput]:
        self.launched.put(batch.step)
        if on_layer is not None:
            on_layer(batch.step)
        if batch.step in self.unlaunchable:
            raise ArithmeticError("no room")

        def output() -> StepOutput:
            assert self.computed[batch.step].wait(WAIT_S)
            if batch.step in self.failing:
                raise ArithmeticError("an illegal address")
            return StepOutput(batch.step, ((Drawn(7),),))

        return output

    def compute(self, *steps: int) -> None:
        for step in steps:
            self.computed[step].set()


@dataclass
class Ahead:
    role: FakeRole
    gpu: Gpu
    inbox: Inbox

    def launched(self) -> int:
        return self.gpu.launched.get(timeout=WAIT_S)

    def settled(self) -> None:
        """The loop has made every turn it can."""
        seen = threading.Event()
        self.inbox.put(seen.set)
        assert seen.wait(WAIT_S)


@pytest.fixture
def ahead() -> Iterator[Ahead]:
    role, gpu, inbox = FakeRole(tells_layers=False), Gpu(), SimpleQueue()
    look_ahead = LookAhead(gpu.launch)
    loop: EngineLoop[FakeDecision] = EngineLoop(
        look_ahead.run, role, inbox=inbox, clock=MonotonicClock(), deliver=lambda _: None, died=lambda _: None
    )
    loop.start()
    yield Ahead(role, gpu, inbox)
    gpu.compute(*range(100))
    loop.stop()
    look_ahead.close()


def test_a_step_is_launched_while_the_one_before_it_computes_and_no_more(ahead: Ahead) -> None:
    ahead.inbox.put(partial(ahead.role.want, 4))
    assert [ahead.launched(), ahead.launched()] == [0, 1]
    ahead.settled()
    assert (ahead.role.completed, ahead.gpu.launched.empty()) == ([], True)
    ahead.gpu.compute(0)
    assert ahead.launched() == 2, "while step 1 computes"
    ahead.gpu.compute(1, 2, 3)
    assert ahead.role.done.wait(WAIT_S)
    assert ahead.role.completed == [0, 1, 2, 3]


def test_what_a_step_fails_by_is_told_in_its_turn(ahead: Ahead) -> None:
    """Step 1 cannot be launched, which is known at once; step 3 fails on the device."""
    ahead.gpu.unlaunchable, ahead.gpu.failing = {1}, {3}
    ahead.inbox.put(partial(ahead.role.want, 5))
    assert [ahead.launched(), ahead.launched()] == [0, 1]
    ahead.settled()
    assert (ahead.role.completed, ahead.role.abandoned) == ([], [])
    ahead.gpu.compute(*range(5))
    assert ahead.role.done.wait(WAIT_S)
    assert ahead.role.completed == [0, 2, 4]
    assert [(step, error.message) for step, error in ahead.role.abandoned] == [
        (1, "The engine failed: ArithmeticError: no room"),
        (3, "The engine failed: ArithmeticError: an illegal address"),
    ]


def test_a_step_whose_layers_are_told_is_waited_for(ahead: Ahead) -> None:
    ahead.role.tells_layers = True
    ahead.inbox.put(partial(ahead.role.want, 2))
    assert ahead.launched() == 0
    ahead.settled()
    assert (ahead.role.decided, ahead.role.layers, ahead.gpu.launched.empty()) == (2, [0], True)
    ahead.gpu.compute(0)
    assert ahead.launched() == 1
    ahead.gpu.compute(1)
    assert ahead.role.done.wait(WAIT_S)


def test_a_decision_that_comes_while_a_step_computes_was_not_waited_for(ahead: Ahead) -> None:
    recording = Recording(60, 1000)
    ahead.inbox.put(partial(ahead.role.want, 4))
    assert [ahead.launched(), ahead.launched()] == [0, 1]
    for step in (0, 1):
        ahead.gpu.compute(step)
        assert ahead.launched() == step + 2
    waits = [span.doing for span in recording.end().spans if span.doing in (Doing.WAIT, Doing.UNDER_WAY)]
    assert waits[-2:] == [Doing.UNDER_WAY] * 2


def test_one_failed_step_ends_a_process_that_may_have_none() -> None:
    def slip(batch: Batch, on_layer, ran: Ran) -> None:
        raise ArithmeticError("a rank slipped")

    role, inbox, deaths = FakeRole(), SimpleQueue(), SimpleQueue()
    loop: EngineLoop[FakeDecision] = EngineLoop(
        slip, role, inbox=inbox, clock=MonotonicClock(), deliver=lambda _: None, died=deaths.put, broken_after=1
    )
    loop.start()
    inbox.put(partial(role.want, 1))
    assert isinstance(deaths.get(timeout=WAIT_S).__cause__, ArithmeticError)
    assert role.abandoned == []
    loop.stop()


def test_an_error_in_the_policy_ends_the_process(stage: Stage) -> None:
    def slip() -> None:
        raise KeyError("a block nobody owns")

    stage.inbox.put(slip)
    assert isinstance(stage.deaths.get(timeout=WAIT_S), KeyError)


@pytest.fixture
def checked_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECK_EVERY_S", 0.0)


@pytest.mark.usefixtures("checked_every_turn")
def test_books_are_checked_while_there_is_work(stage: Stage) -> None:
    stage.inbox.put(partial(stage.role.want, 3))
    stage.engine.started.get(timeout=WAIT_S)
    stage.engine.permits.release(3)
    assert stage.role.done.wait(WAIT_S)
    stage.loop.stop()
    assert False in stage.role.checks


def test_steps_alone_are_reported_now_and_then(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEADY_REPORT_S", 1e9)
    stage.engine.permits.release(30)
    stage.inbox.put(partial(stage.role.want, 30))
    assert stage.role.done.wait(WAIT_S)
    stage.loop.stop()
    reports = [delivery.report for delivery in stage.deliveries if delivery.report is not None]
    assert len(reports) <= 4, "at the start, when there is something to do, at the end, and when told to stop"
    assert reports[-1].running == 0
    assert stage.deliveries[-1].idle


def test_a_report_that_is_wanted_does_not_wait_for_the_steps_to_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEADY_REPORT_S", 1e9)
    stage.inbox.put(partial(stage.role.want, 20))
    stage.engine.permits.release()
    for _ in range(2):  # the first has ended
        stage.engine.started.get(timeout=WAIT_S)
    stage.inbox.put(partial(setattr, stage.role.outbox, "wants_report", True))
    stage.engine.permits.release(10)
    for _ in range(10):  # the turn that heard it is over: two steps at most are decided in one
        stage.engine.started.get(timeout=WAIT_S)
    reports = [delivery.report for delivery in stage.deliveries if delivery.report is not None]
    assert 0 < reports[-1].running < 20
    assert not stage.role.outbox.wants_report


def test_idle_books_are_checked_and_reports_come_on_change_only(stage: Stage) -> None:
    stage.engine.permits.release(2)
    stage.inbox.put(partial(stage.role.want, 2))
    assert stage.role.done.wait(WAIT_S)
    for _ in range(3):
        stage.inbox.put(lambda: None)
    stage.loop.stop()
    assert stage.role.checks.count(True) >= 2
    reports = [delivery.report for delivery in stage.deliveries if delivery.report is not None]
    assert all(one != next_one for one, next_one in itertools.pairwise(reports))
    assert reports[-1].running == 0
    assert stage.deliveries[-1].idle
