"""The two roles over their real schedulers, with a transfer's end and an engine that only take notes: every race by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from diptych.core.clock import ManualClock
from diptych.core.commands import (
    ChoiceFinished,
    Decode,
    Failed,
    Finished,
    FirstTokens,
    HandedOver,
    Movable,
    NewTokens,
    Prefill,
    StepEvents,
    Stop,
)
from diptych.core.errors import Cancelled, Internal, TransferFailed, Unavailable
from diptych.core.fleet import WorkerState
from diptych.core.layout import CacheGroup, CacheKind, DType
from diptych.core.prefix import chained
from diptych.core.request import FinishReason, Request, Token, Tokens
from diptych.core.sampling import SamplingParams
from diptych.decode_worker.role import DecodeRole
from diptych.decode_worker.scheduler import DecodeScheduler
from diptych.engine.batch import Batch, Drawn, StepOutput
from diptych.engine.block_pool import BlockPool
from diptych.prefill_worker.role import PrefillRole
from diptych.prefill_worker.scheduler import PrefillScheduler
from diptych.worker.loop import Inbox, StepTimes
from diptych.worker.report import Reporter

LAYERS = 3
GROUPS = (CacheGroup(CacheKind.FULL, tuple(range(LAYERS)), 1, 4, DType.FLOAT32),)
BLOCKS = 8
EOS = 1


class Ear:
    def send(self, events: StepEvents) -> None:
        raise AssertionError("the outbox only gathers")


@dataclass
class Notes:
    """Stands for `Source` or `Destination`: keeps the names and arguments of all calls."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    events: Any = None

    def __call__(self, events: Any) -> Notes:
        self.events = events
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def together(self, positions: int) -> int:
        return 1

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, *arguments in self.calls if called == name]


class Desk:
    """One role and all around it; `turn` does what the loop does between two waits."""

    def __init__(self, *, prefill: bool, layers: tuple[tuple[int, ...], ...] = (tuple(range(LAYERS)),)) -> None:
        """`layers` of each rank."""
        self.notes, self.ear, self.clock = Notes(), Ear(), ManualClock()
        self.inbox: Inbox = SimpleQueue()
        self.said: list[Any] = []
        self.flying: list[Any] = []
        scheduling: dict[str, Any] = {
            "pool": BlockPool((BLOCKS,), GROUPS, 16),
            "hashes_of": lambda request, token_ids: chained(b"root", token_ids),
            "chunk_tokens": 32,
            "max_running": 4,
            "max_context": 1000,
            "eos_token_ids": (EOS,),
        }
        common: dict[str, Any] = {"vocab_size": 100, "reporter": Reporter("w", 1), "clock": self.clock, "inbox": self.inbox}
        self.role: Any
        if prefill:
            self.role = PrefillRole(
                PrefillScheduler(**scheduling), layers=layers, call_soon=lambda call: call(), source=self.notes, **common
            )
        else:
            self.role = DecodeRole(DecodeScheduler(**scheduling), destination=self.notes, **common)

    def turn(self) -> list[Any]:
        """Take what has come and decide up to two steps; what was said to the router."""
        while not self.inbox.empty():
            self.inbox.get_nowait()()
        self.role.settle()
        while len(self.flying) < 2 and (decision := self.role.decide()) is not None:
            self.flying.append(decision)
        return self.hear()

    def hear(self) -> list[Any]:
        delivery = self.role.outbox.take()
        for call in delivery.calls:
            call()
        said = [event for listener, events in delivery.events for event in events.events if listener is self.ear]
        self.said += said
        return said

    def ran(self, token: int = 7) -> list[Any]:
        """The oldest step has run, layer by layer, every row drawing `token`."""
        decision = self.flying.pop(0)
        hook = self.role.on_layer(decision)
        for layer in range(LAYERS) if hook else ():
            hook(layer)
        batch: Batch = decision.batch
        output = StepOutput(batch.step, tuple((Drawn(token),) * len(row.draws) for row in batch.rows))
        self.role.complete(decision, output, StepTimes(0.0, 0.0))
        return self.hear() + self.turn()

    def run_dry(self, token: int = 7) -> None:
        while self.flying:
            self.ran(token)

    def clean(self) -> None:
        """Nothing is held, nothing is owed, the books are right."""
        self.turn()
        assert not self.flying
        assert self.role.idle()
        self.role.check(idle=True)


def asked(length: int = 40, start: int = 3, **sampling: Any) -> Request:
    ids = tuple(3 + (start + i) % 90 for i in range(length))
    return Request("r", "", (Tokens(ids),), SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **sampling}))


def prefilling(request: Request | None = None, destination: str | None = "d:1") -> Desk:
    desk = Desk(prefill=True)
    desk.role.command(desk.ear, Prefill("a", request or asked(), destination))
    desk.turn()
    return desk


def test_a_prompt_is_offered_computed_told_and_committed_in_this_order() -> None:
    desk = prefilling()
    assert desk.notes.calls == [("offer", "a", "d:1", 40)]
    desk.ran()
    said = desk.ran()
    computed = desk.notes.named("computed")
    assert [(layers, start, stop) for _, layers, start, stop, _, _ in computed] == [
        ((layer,), start, stop) for start, stop in ((0, 32), (32, 40)) for layer in range(LAYERS)
    ]
    (first,) = said
    assert isinstance(first, FirstTokens)
    assert first.tokens == (Token(0, 7),)
    assert desk.notes.calls[-1] == ("commit", "a", (Token(0, 7),))
    desk.notes.events.handed_over("a", 4096, 0.5, "shm")
    desk.notes.events.released("a")
    assert desk.turn() == [HandedOver("a", 4096, 0.5, "shm")]
    desk.clean()


def test_what_the_prefix_cache_holds_is_reported_at_once() -> None:
    desk = prefilling()
    desk.run_dry()
    desk.notes.events.handed_over("a", 1, 0.1, "shm")
    desk.notes.events.released("a")
    desk.turn()
    desk.notes.calls.clear()
    desk.role.command(desk.ear, Prefill("b", asked(), "d:1"))
    desk.turn()
    offer, cached = desk.notes.calls
    assert offer == ("offer", "b", "d:1", 40)
    assert cached[:5] == ("computed", "b", tuple(range(LAYERS)), 0, 32)
    desk.run_dry()
    assert desk.said[-1].cached_tokens == 32
    desk.notes.events.released("b")
    desk.role.command(desk.ear, Stop("b"))
    desk.clean()


def test_what_each_rank_stores_is_reported_for_it_and_what_is_cached_for_all() -> None:
    stages = ((0, 1), (2,))
    desk = Desk(prefill=True, layers=stages)

    def store(decision: Any) -> None:
        hook = desk.role.on_layer(decision)
        for rank, layers in enumerate(stages):
            for layer in layers:
                hook(layer, rank)
        batch: Batch = decision.batch
        output = StepOutput(batch.step, tuple((Drawn(7),) * len(row.draws) for row in batch.rows))
        desk.role.complete(decision, output, StepTimes(0.0, 0.0))

    for attempt_id in ("a", "b"):
        desk.notes.calls.clear()
        desk.role.command(desk.ear, Prefill(attempt_id, asked(), "d:1"))
        desk.turn()
        while desk.flying:
            store(desk.flying.pop(0))
            desk.turn()
        said = [(*call[1:4], call[5]) for call in desk.notes.named("computed")]
        if attempt_id == "a":
            assert said[:3] == [((0,), 0, 32, 0), ((1,), 0, 32, 0), ((2,), 0, 32, 1)]
        else:
            assert said[:2] == [((0, 1), 0, 32, 0), ((2,), 0, 32, 1)]
        assert said[-3:] == [((0,), 32, 40, 0), ((1,), 32, 40, 0), ((2,), 32, 40, 1)]
        desk.notes.events.handed_over(attempt_id, 1, 0.1, "shm")
        desk.notes.events.released(attempt_id)
        desk.turn()
    desk.clean()


def test_a_first_token_that_ends_the_request_cancels_the_transfer() -> None:
    desk = prefilling()
    desk.ran()
    first, finished = desk.ran(EOS)
    assert first.finishes == (FinishReason.STOP,)
    assert isinstance(finished, Finished)
    assert not desk.notes.named("commit")
    assert desk.notes.named("cancel")
    assert not desk.role.idle(), "the blocks stay until the source says that nothing reads them"
    desk.notes.events.failed("a", Cancelled("by ourselves"))
    desk.notes.events.released("a")
    desk.clean()
    assert [type(event) for event in desk.said] == [FirstTokens, Finished]


def test_a_prompt_nobody_decodes_is_never_offered() -> None:
    desk = prefilling(asked(max_tokens=1), destination=None)
    desk.run_dry()
    assert desk.notes.calls == []
    assert [type(event) for event in desk.said] == [FirstTokens, Finished]
    desk.clean()


def test_a_stop_that_crosses_the_ack_says_one_thing_only() -> None:
    desk = prefilling()
    desk.run_dry()
    desk.notes.events.handed_over("a", 1, 0.1, "shm")
    desk.role.command(desk.ear, Stop("a"))  # the loop takes it before the Ack
    desk.notes.events.released("a")
    desk.clean()
    assert [type(event) for event in desk.said] == [FirstTokens, Failed]


def test_a_stop_with_two_steps_in_flight_computes_no_third() -> None:
    desk = prefilling(asked(100))
    assert len(desk.flying) == 2
    desk.role.command(desk.ear, Stop("a"))
    (failed,) = desk.turn()
    assert isinstance(failed.error, Cancelled)
    desk.notes.events.failed("a", Cancelled("by ourselves"))
    desk.notes.events.released("a")
    desk.turn()
    desk.run_dry()
    assert desk.said == [failed]
    desk.clean()


def test_a_transfer_that_fails_while_the_prompt_is_computed_ends_it() -> None:
    desk = prefilling(asked(100))
    desk.notes.events.failed("a", TransferFailed("the lane broke"))
    desk.notes.events.released("a")
    (failed,) = desk.turn()
    assert isinstance(failed.error, TransferFailed)
    desk.run_dry()
    desk.clean()
    assert dict(desk.role.report().counters)["diptych_worker_transfers_failed_total"] == 1


def test_who_was_turned_away_at_a_pool_is_counted() -> None:
    desk = prefilling(asked(100))
    desk.notes.events.turned_away()
    desk.run_dry()
    desk.notes.events.failed("a", TransferFailed("the lane broke"))
    desk.notes.events.released("a")
    desk.run_dry()
    desk.clean()
    assert dict(desk.role.report().counters)["diptych_worker_pool_refusals_total"] == 1


def test_a_failed_step_fails_its_prompt_and_not_the_next() -> None:
    desk = prefilling(asked(60))
    desk.role.command(desk.ear, Prefill("b", asked(60, start=40), "d:1"))
    for _ in range(2):
        decision = desk.flying.pop(0)
        desk.role.abandon(decision, Internal("slipped"))
    desk.hear()
    desk.notes.events.released("a")
    desk.turn()
    desk.run_dry()
    failed = [event.attempt_id for event in desk.said if isinstance(event, Failed)]
    assert failed[0] == "a"
    for left in ("a", "b"):
        desk.role.command(desk.ear, Stop(left))
        desk.turn()
        desk.notes.events.released(left)
    desk.clean()


def test_a_draining_worker_takes_nothing_new_and_ends_what_it_has() -> None:
    desk = prefilling()
    desk.role.drain()
    assert desk.role.report().state is WorkerState.DRAINING
    assert desk.role.outbox.wants_report, "until routers know of it they send more"
    desk.role.command(desk.ear, Prefill("b", asked(), "d:1"))
    (refused,) = desk.turn()
    assert (refused.attempt_id, type(refused.error)) == ("b", Unavailable)
    desk.run_dry()
    desk.notes.events.handed_over("a", 1, 0.1, "shm")
    desk.notes.events.released("a")
    desk.clean()


def test_a_prefill_worker_that_leaves_says_what_has_not_begun_or_has_no_grant() -> None:
    desk = Desk(prefill=True)
    for number, attempt_id in enumerate(("granted", "ungranted")):
        desk.role.command(desk.ear, Prefill(attempt_id, asked(16, start=20 * number), "d:1"))
    desk.turn()
    desk.notes.events.granted("granted")
    desk.ran()
    for attempt_id, length in (("computed", 32), ("waiting", 90)):
        desk.role.command(desk.ear, Prefill(attempt_id, asked(length, start=length), "d:1"))
    desk.turn()
    desk.role.drain()
    assert desk.turn() == [Movable("waiting"), Movable("ungranted")]
    first, movable = desk.ran()
    assert (first.attempt_id, movable) == ("computed", Movable("computed"))
    desk.role.drain()
    assert desk.turn() == [], "it is said once"
    for attempt_id in ("waiting", "ungranted", "computed"):
        desk.role.command(desk.ear, Stop(attempt_id))
    assert [type(event.error) for event in desk.turn()] == [Cancelled] * 3
    assert [transfer for transfer, _ in desk.notes.named("cancel")] == ["ungranted", "computed"]
    for attempt_id in ("ungranted", "computed"):
        desk.notes.events.released(attempt_id)
    desk.turn()
    assert not desk.role.idle(), "what is granted it hands over"
    desk.notes.events.handed_over("granted", 1, 0.1, "shm")
    desk.notes.events.released("granted")
    desk.clean()


def test_a_decode_worker_that_leaves_says_what_waits_for_memory_or_an_offer() -> None:
    desk = Desk(prefill=False)
    desk.role.command(desk.ear, Decode("running", asked(16), local_prefill=True))
    desk.turn()
    for attempt_id, length in (("granted", 16), ("queued", 120), ("expected", 16)):
        desk.role.command(desk.ear, Decode(attempt_id, asked(length, start=50)))
    for attempt_id, length in (("granted", 16), ("queued", 120)):
        desk.notes.events.offered(attempt_id, length)
    desk.turn()
    assert [transfer for transfer, _ in desk.notes.named("grant")] == ["granted"]
    desk.role.drain()
    assert desk.turn() == [Movable("expected"), Movable("queued")]
    for attempt_id in ("expected", "queued"):
        desk.role.command(desk.ear, Stop(attempt_id))
    assert [type(event.error) for event in desk.turn()] == [Cancelled] * 2
    desk.notes.events.committed("granted", (Token(0, 9),), 4096, 0.1, ())
    desk.turn()
    desk.run_dry()
    desk.clean()


def test_the_first_tokens_of_all_choices_are_told_and_committed_together() -> None:
    desk = prefilling(asked(n=3))
    desk.ran()
    (first,) = desk.ran()
    tokens = tuple(Token(0, 7, choice=choice) for choice in range(3))
    assert (first.tokens, first.finishes) == (tokens, (None,) * 3)
    assert desk.notes.calls[-1] == ("commit", "a", tokens)
    desk.role.command(desk.ear, Stop("a", 1))
    assert desk.turn() == [], "what becomes of one choice is D's"
    desk.notes.events.handed_over("a", 4096, 0.5, "shm")
    desk.notes.events.released("a")
    desk.clean()


def decoding(**sampling: Any) -> Desk:
    """An attempt granted and not yet committed."""
    desk = Desk(prefill=False)
    desk.role.command(desk.ear, Decode("a", asked(**sampling)))
    desk.turn()
    assert desk.notes.calls == [("expect", "a")]
    desk.notes.events.offered("a", 40)
    desk.turn()
    assert desk.notes.calls[-1][:2] == ("grant", "a")
    return desk


def test_an_attempt_is_expected_granted_and_decoded_after_its_commit() -> None:
    desk = decoding()
    assert not desk.flying
    desk.notes.events.committed("a", (Token(0, 9),), 4096, 0.1, ())
    desk.turn()
    assert len(desk.flying) == 2, "the second step is decided while the first is in flight"
    desk.run_dry()
    assert [token.index for event in desk.said if isinstance(event, NewTokens) for token in event.tokens] == [1, 2, 3]
    assert desk.said[-2:] == [ChoiceFinished("a", 0, FinishReason.LENGTH), Finished("a")]
    desk.clean()


def test_a_commit_without_every_first_token_fails_the_attempt_and_gives_the_blocks_back() -> None:
    for firsts in ((), (Token(0, 9, choice=1),), (Token(0, 9), Token(0, 9, choice=1))):
        desk = decoding()
        desk.notes.events.committed("a", firsts, 4096, 0.1, ())
        desk.turn()
        assert isinstance(desk.said[-1], Failed)
        assert isinstance(desk.said[-1].error, TransferFailed)
        assert not desk.flying
        desk.clean()


def test_what_is_nearly_done_gets_the_blocks_kept_for_growth() -> None:
    desk = decoding()
    desk.role.command(desk.ear, Decode("b", asked(80, start=50)))
    desk.notes.events.offered("b", 80)
    desk.turn()
    assert [name for name, _ in desk.notes.named("grant")] == ["a"], "5 of 8 blocks are left, and one of them is for growth"
    desk.notes.events.nearly_done("b")
    desk.turn()
    assert [name for name, _ in desk.notes.named("grant")] == ["a", "b"]
    for left in ("a", "b"):
        desk.role.command(desk.ear, Stop(left))
        desk.turn()
        desk.notes.events.released(left)
    desk.clean()


def test_a_stop_that_crosses_the_commit_gives_the_blocks_back() -> None:
    desk = decoding()
    desk.role.command(desk.ear, Stop("a"))
    desk.notes.events.committed("a", (Token(0, 9),), 4096, 0.1, ())  # the destination was faster than the stop
    (failed,) = desk.turn()
    assert isinstance(failed.error, Cancelled)
    assert desk.notes.named("cancel") == [["a"]]
    desk.clean()


def test_a_stop_before_the_commit_keeps_the_blocks_until_the_fence() -> None:
    desk = decoding()
    desk.role.command(desk.ear, Stop("a"))
    desk.turn()
    desk.notes.events.failed("a", Cancelled("by ourselves"))
    desk.turn()
    assert not desk.role.idle()
    desk.notes.events.released("a")
    desk.clean()
    assert len(desk.said) == 1


def test_choices_end_one_by_one_and_the_attempt_behind_the_last() -> None:
    desk = decoding(n=3)
    desk.notes.events.committed("a", (Token(0, 9), Token(0, EOS, choice=1), Token(0, 9, choice=2)), 4096, 0.1, ())
    desk.turn()
    desk.ran()
    desk.role.command(desk.ear, Stop("a", 0))
    assert desk.turn() == []
    desk.run_dry()
    ends = [event for event in desk.said if not isinstance(event, NewTokens)]
    assert ends == [ChoiceFinished("a", 2, FinishReason.LENGTH), Finished("a")], "the source told of choice 1, the router of choice 0"
    tokens = [(token.choice, token.index) for event in desk.said if isinstance(event, NewTokens) for token in event.tokens]
    assert tokens == [(0, 1), (2, 1), (2, 2), (2, 3)]
    desk.clean()


def test_a_stop_of_the_last_choice_ends_the_attempt() -> None:
    desk = decoding(n=2)
    desk.role.command(desk.ear, Stop("a", 1))
    desk.notes.events.committed("a", (Token(0, 9), Token(0, 9, choice=1)), 4096, 0.1, ())
    desk.turn()
    desk.role.command(desk.ear, Stop("a", 0))
    assert desk.turn() == [Finished("a")]
    desk.run_dry()
    desk.clean()


def test_a_router_that_stops_an_attempt_ends_all_its_choices() -> None:
    desk = decoding(n=4)
    desk.notes.events.committed("a", tuple(Token(0, 9, choice=choice) for choice in range(4)), 4096, 0.1, ())
    desk.turn()
    desk.role.drain()
    assert desk.role.report().running == 4
    desk.role.command(desk.ear, Stop("a"))
    (failed,) = desk.turn()
    assert isinstance(failed.error, Cancelled)
    desk.run_dry()
    desk.clean()


def test_a_failed_step_fails_the_attempts_whose_blocks_it_should_have_copied() -> None:
    desk = Desk(prefill=False)
    desk.role.command(desk.ear, Decode("long", asked(96, start=50), local_prefill=True))
    resumed = replace(asked(5, n=2, max_tokens=20), generated=((5,) * 9, (6,) * 9))
    desk.role.command(desk.ear, Decode("a", resumed))
    desk.notes.events.offered("a", 5)
    desk.turn()
    desk.notes.events.committed("a", (), 4096, 0.1, ())
    desk.ran()
    step = next(decision for decision in desk.flying if decision.forked)
    assert (step.attempts, step.forked) == (("long",), ("a",)), "the long prompt leaves a no room in this step"
    while desk.flying[0] is not step:
        desk.ran()
    desk.role.abandon(desk.flying.pop(0), Internal("slipped"))
    assert {event.attempt_id for event in desk.hear() if isinstance(event, Failed)} == {"long", "a"}
    desk.run_dry()
    desk.clean()


def test_a_failed_transfer_fails_the_attempt_once() -> None:
    desk = decoding()
    desk.notes.events.failed("a", TransferFailed("no piece for a lease"))
    desk.notes.events.released("a")
    (failed,) = desk.turn()
    assert isinstance(failed.error, TransferFailed)
    desk.role.command(desk.ear, Stop("a"))
    desk.clean()
    assert desk.said == [failed]


def test_an_offer_of_another_prompt_is_refused_and_fails_the_attempt() -> None:
    desk = Desk(prefill=False)
    desk.role.command(desk.ear, Decode("a", asked()))
    desk.turn()
    desk.notes.events.offered("a", 41)
    (failed,) = desk.turn()
    assert isinstance(failed.error, TransferFailed)
    assert desk.notes.calls[-1][:2] == ("refuse", "a")
    desk.notes.events.failed("a", TransferFailed("refused"))
    desk.notes.events.released("a")
    desk.clean()


def test_a_failed_step_fails_every_attempt_in_it() -> None:
    desk = decoding()
    desk.notes.events.committed("a", (Token(0, 9),), 4096, 0.1, ())
    desk.role.command(desk.ear, Decode("b", asked(20, start=50), local_prefill=True))
    desk.turn()
    for decision in list(desk.flying):
        desk.flying.remove(decision)
        desk.role.abandon(decision, Internal("slipped"))
    desk.hear()
    desk.run_dry()
    assert sorted(event.attempt_id for event in desk.said if isinstance(event, Failed)) == ["a", "b"]
    desk.clean()


def test_a_router_that_is_gone_hears_nothing_more() -> None:
    desk = decoding()
    desk.role.command(desk.ear, Decode("b", asked(20, start=50), local_prefill=True))
    desk.turn()
    desk.role.detached(desk.ear)
    desk.notes.events.failed("a", Cancelled("by ourselves"))
    desk.notes.events.released("a")
    desk.turn()
    desk.run_dry()
    assert not [event for event in desk.said if not isinstance(event, NewTokens)]
    desk.clean()
