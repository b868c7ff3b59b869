"""One terminal event per attempt, and one message per router and turn."""

from __future__ import annotations

from diptych.core.commands import Failed, Finished, NewTokens, StepEvents
from diptych.core.errors import Cancelled
from diptych.core.request import FinishReason, Token
from diptych.worker.attempts import Attempts
from diptych.worker.outbox import Outbox


class Ear:
    def send(self, events: StepEvents) -> None:
        raise AssertionError("the outbox only gathers")


def test_nothing_is_said_after_the_end() -> None:
    outbox, ear = Outbox(), Ear()
    attempts = Attempts(outbox)
    attempts.open("a", ear)
    token = NewTokens("a", (Token(0, 5),))
    attempts.tell(token)
    assert attempts.end(Finished("a", FinishReason.STOP))
    assert not attempts.end(Failed("a", Cancelled("late")))
    attempts.tell(token)
    ((listener, events),) = outbox.take().events
    assert listener is ear
    assert events == StepEvents((token, Finished("a", FinishReason.STOP)))
    assert not outbox


def test_a_turn_says_all_to_a_router_in_one_message() -> None:
    outbox, one, other = Outbox(), Ear(), Ear()
    attempts = Attempts(outbox)
    for attempt_id, ear in (("a", one), ("b", other), ("c", one)):
        attempts.open(attempt_id, ear)
    events = [NewTokens(attempt_id, (Token(0, 1),)) for attempt_id in "abc"]
    for event in events:
        attempts.tell(event)
    said = dict(outbox.take().events)
    assert said == {one: StepEvents((events[0], events[2])), other: StepEvents((events[1],))}


def test_a_router_that_is_gone_takes_its_attempts_along_and_only_its_own() -> None:
    attempts, one, other = Attempts(Outbox()), Ear(), Ear()
    attempts.open("a", one)
    attempts.open("b", other)
    assert not attempts.belongs("a", other)
    assert attempts.forget(one) == ["a"]
    assert "a" not in attempts
    assert attempts.belongs("b", other)
