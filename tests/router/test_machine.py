"""The request machine: scenarios by hand, then random interleavings under which its promises must hold."""

import pytest
from diptych.core.commands import ChoiceFinished, Decode, Failed, Finished, FirstTokens, HandedOver, Movable, NewTokens, Prefill, Stop
from diptych.core.errors import Cancelled, Internal, InvalidRequest, TransferFailed, Unavailable
from diptych.core.fleet import Member, Phase
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.request import FinishReason, Request, Token, Tokens
from diptych.core.sampling import SamplingParams
from diptych.router.actions import Emit, End, Fail, Move, Place, Send, Succeed
from diptych.router.machine import RequestMachine
from diptych.router.placement import Placement
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

LAYOUT = Layout("f", (CacheGroup(CacheKind.FULL, (0,), 1, 16, DType.FLOAT32),), 16, (64,))
P1, P2 = (Member(w, f"{w}:1", Phase.PREFILL, 1, LAYOUT, 1024) for w in ("p1", "p2"))
D1, D2 = (Member(w, f"{w}:1", Phase.DECODE, 1, LAYOUT, 1024) for w in ("d1", "d2"))


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def machine(max_tokens=8, retries=2, n=1):
    request = Request("r", "m", (Tokens((1, 2, 3)),), SamplingParams(max_tokens=max_tokens, seed=1, n=n))
    return RequestMachine(request, retries=retries)


def opened(max_tokens=8, n=1):
    m = machine(max_tokens, n=n)
    m.start()
    m.placed(Placement(P1, D1), "a")
    return m


def token(index, choice=0):
    return Token(index, 100 * (1 + choice) + index, choice=choice)


def first(attempt, *tokens, ends=(), cached=0):
    """P's word; `ends`: choice → why it ends with this token."""
    ends = dict(ends)
    return FirstTokens(attempt, tokens, tuple(ends.get(t.choice) for t in tokens), cached_tokens=cached)


def told(m, worker, *events):
    """All that the machine wants after these events."""
    return [action for event in events for action in m.event(worker, event)]


def finished(attempt, reason, choice=0):
    """What D says at the end of its last choice."""
    return ChoiceFinished(attempt, choice, reason), Finished(attempt)


def test_disaggregated_request_from_start_to_end():
    m = machine()
    (place,) = m.start()
    assert place.demand.context_tokens == 3
    assert place.demand.output_tokens == 8
    assert place.cause is None
    to_d, to_p = m.placed(Placement(P1, D1), "a")
    assert to_d == Send("d1", Decode("a", m.request))
    assert to_p == Send("p1", Prefill("a", m.request, "d1:1"))
    assert m.event("p1", first("a", token(0), cached=2)) == [Emit((token(0),))]
    handed = HandedOver("a", 100, 0.01, "shm")
    assert m.event("p1", handed) == []
    assert m.event("d1", NewTokens("a", (token(1), token(2)))) == [Emit((token(1), token(2)))]
    assert told(m, "d1", *finished("a", STOP)) == [End(0, STOP), Succeed()]
    assert (m.handed_over, m.cached_tokens, m.attempts) == (handed, 2, 1)
    assert m.lost("d1") == m.stop(0) == m.give_up(Cancelled("x")) == []


def test_second_token_waits_for_the_first():
    m = opened()
    assert m.event("d1", NewTokens("a", (token(1),))) == []
    assert m.event("p1", first("a", token(0))) == [Emit((token(0), token(1)))]


def test_the_end_waits_for_the_word_of_p():
    m = opened()
    m.event("p1", first("a", token(0)))
    assert told(m, "d1", *finished("a", STOP)) == [End(0, STOP)]
    assert m.event("p1", HandedOver("a", 1, 0.1, "shm")) == [Succeed()]


def test_the_end_of_a_choice_waits_for_its_first_token():
    m = opened()
    assert told(m, "d1", *finished("a", STOP)) == []
    assert m.event("p1", first("a", token(0))) == [Emit((token(0),)), End(0, STOP)]
    assert m.event("p1", HandedOver("a", 1, 0.1, "shm")) == [Succeed()]


@pytest.mark.parametrize("end", [Failed("a", TransferFailed("no ack")), None])
def test_p_may_die_once_d_decodes(end):
    m = opened()
    m.event("p1", first("a", token(0)))
    m.event("d1", NewTokens("a", (token(1),)))
    assert (m.event("p1", end) if end else m.lost("p1")) == []
    assert told(m, "d1", *finished("a", LENGTH)) == [End(0, LENGTH), Succeed()]


def test_one_token_is_for_p_alone():
    m = machine(max_tokens=1)
    m.start()
    assert m.placed(Placement(P1, None), "a") == [Send("p1", Prefill("a", m.request, None))]
    actions = m.event("p1", first("a", token(0), ends={0: LENGTH}))
    assert actions == [Emit((token(0),)), End(0, LENGTH), Succeed()]
    assert m.event("p1", Finished("a")) == []


def test_an_end_token_as_the_first_is_not_output_and_d_is_stopped():
    m = opened()
    actions = m.event("p1", first("a", token(0), ends={0: STOP}))
    assert actions == [End(0, STOP), Send("d1", Stop("a")), Succeed()]


def test_d_cancelled_by_p_waits_for_the_reason():
    m = opened()
    assert m.event("d1", Failed("a", Cancelled("P cancelled"))) == []
    assert m.event("p1", first("a", token(0), ends={0: STOP})) == [End(0, STOP), Succeed()]
    m = opened()
    m.event("d1", Failed("a", Cancelled("P cancelled")))
    (place,) = m.event("p1", Failed("a", Internal("broke")))
    assert isinstance(place, Place)


def test_retry_resumes_after_what_was_sent_and_avoids_the_dead():
    m = opened()
    m.event("p1", first("a", token(0)))
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    m.event("d1", NewTokens("a", (token(1),)))
    (place,) = m.lost("d1")
    assert (place.demand.context_tokens, place.demand.output_tokens) == (5, 6)
    assert place.demand.avoid == {"d1"}
    assert not place.demand.local
    to_d, to_p = m.placed(Placement(P1, D2), "b")
    assert to_p.command.request.generated == ((100, 101),)
    assert to_d.command.request.prompt == m.request.prompt
    assert m.event("d1", NewTokens("a", (token(2),))) == []
    assert m.event("p1", first("b", token(2))) == [Emit((token(2),))]


def test_a_failed_transfer_closes_both_and_the_last_attempt_is_local():
    m = opened()
    stop, place = m.event("d1", Failed("a", TransferFailed("torn")))
    assert stop == Send("p1", Stop("a"))
    assert place.demand.avoid == {"p1", "d1"}
    m.placed(Placement(P2, D2), "b")
    stop, place = m.lost("p2")
    assert stop == Send("d2", Stop("b"))
    assert place.demand.local
    assert m.placed(Placement(None, D1), "c") == [Send("d1", Decode("c", m.request, local_prefill=True))]
    assert isinstance(m.lost("d1")[-1], Fail)


def test_errors_of_the_request_are_not_retried():
    m = opened()
    error = InvalidRequest("bad", field="prompt")
    assert m.event("d1", Failed("a", error)) == [Send("p1", Stop("a")), Fail(error)]


def test_all_tokens_sent_is_an_end_even_if_the_word_is_lost():
    m = opened(max_tokens=2)
    m.event("p1", first("a", token(0)))
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    m.event("d1", NewTokens("a", (token(1),)))
    assert m.lost("d1") == [End(0, LENGTH), Succeed()]


def test_the_client_goes_while_a_place_is_sought():
    m = machine()
    m.start()
    error = Cancelled("gone")
    assert m.give_up(error) == [Fail(error)]
    assert m.placed(Placement(P1, D1), "a") == []


def test_nobody_to_place_on():
    m = machine()
    m.start()
    error = Unavailable("none")
    assert m.unplaceable(error) == [Fail(error)]


def test_choices_go_out_and_end_apart():
    m = opened(n=3)
    firsts = tuple(token(0, choice) for choice in range(3))
    actions = m.event("p1", first("a", *firsts, ends={1: STOP}))
    assert actions == [Emit((firsts[0],)), Emit((firsts[2],)), End(1, STOP)]
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    mixed = NewTokens("a", (token(1, 2), token(1, 0), token(2, 2)))
    assert m.event("d1", mixed) == [Emit((token(1, 2), token(2, 2))), Emit((token(1, 0),))]
    assert m.event("d1", ChoiceFinished("a", 2, STOP)) == [End(2, STOP)]
    assert m.event("d1", NewTokens("a", (token(3, 2), token(2, 0)))) == [Emit((token(2, 0),))]
    assert told(m, "d1", *finished("a", LENGTH)) == [End(0, LENGTH), Succeed()]


def test_p_cancels_only_if_every_choice_has_ended():
    m = opened(n=2)
    assert m.event("p1", first("a", token(0), token(0, 1), ends={0: STOP}))[-1] == End(0, STOP)
    assert m.stop(1) == [End(1, STOP), Send("p1", Stop("a")), Send("d1", Stop("a")), Succeed()]
    m = opened(n=2)
    ends = [End(0, STOP), End(1, STOP), Send("d1", Stop("a")), Succeed()]
    assert m.event("p1", first("a", token(0), token(0, 1), ends={0: STOP, 1: STOP})) == ends


def test_a_stopped_choice_leaves_the_others_alone():
    m = opened(n=2)
    m.event("p1", first("a", token(0), token(0, 1)))
    assert m.stop(0) == [End(0, STOP), Send("d1", Stop("a", 0))]
    assert m.stop(0) == []
    assert m.event("d1", NewTokens("a", (token(1, 0), token(1, 1)))) == [Emit((token(1, 1),))]
    assert m.event("d1", ChoiceFinished("a", 0, LENGTH)) == []
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    assert told(m, "d1", *finished("a", LENGTH, 1)) == [End(1, LENGTH), Succeed()]


def test_a_retry_has_each_choice_s_tokens_and_runs_only_those_that_have_not_ended():
    m = opened(n=4)
    m.event("p1", first("a", *(token(0, choice) for choice in range(3)), token(0, 3), ends={1: STOP}))
    m.stop(3)
    m.event("d1", NewTokens("a", (token(1, 2),)))
    stop, place = m.lost("d1")
    assert stop == Send("p1", Stop("a"))
    assert (place.demand.context_tokens, place.demand.output_tokens, place.demand.choices) == (3, 8, 2)
    to_d, to_p = m.placed(Placement(P1, D2), "b")
    assert to_p.command.request == to_d.command.request
    assert to_d.command.request.generated == ((100,), (), (300, 301), (400,))
    assert to_d.command.request.finished == {1, 3}
    assert m.event("p1", first("b")) == []
    assert m.event("d2", NewTokens("b", (token(1, 0), token(2, 2)))) == [Emit((token(1, 0),)), Emit((token(2, 2),))]
    m.event("p1", HandedOver("b", 1, 0.1, "shm"))
    ends = (ChoiceFinished("b", 0, STOP), ChoiceFinished("b", 2, LENGTH), Finished("b"))
    assert told(m, "d2", *ends) == [End(0, STOP), End(2, LENGTH), Succeed()]


def test_a_retry_awaits_p_s_token_only_of_choices_that_have_none():
    m = opened(n=2)
    m.event("d1", NewTokens("a", (token(1, 0),)))
    m.lost("p1")
    m.placed(Placement(P1, D1), "b")
    m.event("p1", first("b", token(0), token(0, 1)))
    m.event("d1", NewTokens("b", (token(1, 0),)))
    m.lost("d1")
    m.placed(Placement(None, D2), "c")
    assert m.event("d2", NewTokens("c", (token(2, 0), token(1, 1)))) == [Emit((token(2, 0),)), Emit((token(1, 1),))]


def test_p_goes_on_for_a_choice_it_draws_nothing_for():
    m = machine(n=2)
    m.start()
    m.placed(Placement(None, D1), "a")
    m.event("d1", NewTokens("a", (token(0),)))
    m.lost("d1")
    m.placed(Placement(P1, D2), "b")
    assert m.event("p1", first("b", token(0, 1), ends={1: STOP})) == [End(1, STOP)]
    assert m.stop(0) == [End(0, STOP), Send("p1", Stop("b")), Send("d2", Stop("b")), Succeed()]


def test_a_choice_with_all_its_tokens_ends_though_its_worker_died():
    m = opened(max_tokens=2, n=2)
    m.event("p1", first("a", token(0), token(0, 1)))
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    m.event("d1", NewTokens("a", (token(1, 1),)))
    end, place = m.lost("d1")
    assert end == End(1, LENGTH)
    assert place.demand.choices == 1


def begun(retries=2, **sampling):
    """A request at P1 and D1, and what is asked for when P1 leaves."""
    m = machine(retries=retries, **sampling)
    m.start()
    m.placed(Placement(P1, D1), "a")
    (move,) = m.event("p1", Movable("a"))
    return m, move


def test_a_prompt_that_waits_goes_to_another_prefill_worker():
    m, move = begun(retries=0)
    assert move == Move("a", move.demand)
    assert move.demand.avoid == {"p1"}
    assert not move.demand.local
    assert m.moved(Placement(P2, D1), "b", "a") == [
        Send("p1", Stop("a")),
        Send("d1", Stop("a")),
        Send("d1", Decode("b", m.request)),
        Send("p2", Prefill("b", m.request, "d1:1")),
    ]
    assert m.event("p1", first("a", token(0))) == [], "it is closed there"
    assert m.event("p2", first("b", token(0))) == [Emit((token(0),))]
    assert m.event("p2", HandedOver("b", 1, 0.1, "shm")) == []
    assert told(m, "d1", *finished("b", LENGTH)) == [End(0, LENGTH), Succeed()]
    assert m.attempts == 2


def test_what_no_memory_was_granted_for_moves_behind_the_token_that_the_client_has():
    m = opened()
    m.event("p1", first("a", token(0)))
    (move,) = m.event("p1", Movable("a"))
    assert (move.demand.context_tokens, move.demand.output_tokens) == (4, 7)
    *_, to_d, to_p = m.moved(Placement(P2, D1), "b", "a")
    assert to_p.command.request.generated == to_d.command.request.generated == ((100,),)
    assert m.event("p2", first("b", token(1))) == [Emit((token(1),))]


def test_a_move_costs_no_retry():
    m, _ = begun(retries=1)
    m.moved(Placement(P2, D1), "b", "a")
    _, place = m.lost("p2")
    assert isinstance(place, Place)
    assert place.demand.avoid == {"p1", "p2"}
    m.placed(Placement(P2, D2), "c")
    assert isinstance(m.lost("p2")[-1], Fail)


def test_it_stays_if_nobody_else_reads_prompts():
    m, _ = begun()
    assert m.moved(Placement(P1, D2), "b", "a") == []
    m, _ = begun()
    assert m.moved(Placement(None, D1), "b", "a") == [], "D has enough to do"
    assert m.event("p1", first("a", token(0))) == [Emit((token(0),))]
    assert m.attempts == 1


def test_it_stays_if_it_has_ended_or_goes_on_by_now():
    m, _ = begun()
    m.event("d1", NewTokens("a", (token(1),)))
    assert m.moved(Placement(P2, D1), "b", "a") == []
    assert m.event("p1", Movable("a")) == []
    m, _ = begun()
    m.lost("p1")
    m.placed(Placement(P2, D1), "b")
    assert m.moved(Placement(P2, D2), "c", "a") == []


def test_what_waits_at_a_decode_worker_that_leaves_goes_to_another():
    m = opened()
    (move,) = m.event("d1", Movable("a"))
    assert move.demand.avoid == {"d1"}
    assert m.moved(Placement(P1, D1), "b", "a") == []
    (move,) = m.event("d1", Movable("a"))
    assert [action.worker_id for action in m.moved(Placement(P1, D2), "b", "a")] == ["p1", "d1", "d2", "p1"]


def test_a_worker_that_leaves_refuses_and_that_costs_no_retry_either():
    m = machine(retries=0)
    m.start()
    m.placed(Placement(P1, D1), "a")
    stop, place = m.event("p1", Failed("a", Unavailable("draining")))
    assert (stop, place.cause, place.demand.avoid) == (Send("d1", Stop("a")), None, {"p1"})
    m.placed(Placement(P2, D1), "b")
    m.event("p2", first("b", token(0)))
    error = TransferFailed("torn")
    assert m.event("d1", Failed("b", error))[-1] == Fail(error)


def test_a_worker_that_refuses_for_ever_is_no_worker_that_leaves():
    m = machine(retries=0)
    m.start()
    m.placed(Placement(P1, D1), "a")
    error = Unavailable("draining")
    m.event("p1", Failed("a", error))
    m.placed(Placement(P1, D1), "b")
    assert m.event("p1", Failed("b", error))[-1] == Fail(error)


@pytest.mark.parametrize(("dead", "tells"), [("p1", "d1"), ("d1", "p1")])
def test_a_worker_that_dies_costs_one_retry_though_the_other_side_hears_of_it_first(dead, tells):
    """It is tried again before its own stream ends: nobody else is there."""
    m = machine(retries=1)
    m.start()
    m.placed(Placement(P1, D1), "a")
    *_, place = m.event(tells, Failed("a", TransferFailed("The lane broke.")))
    assert place.cause is not None
    m.placed(Placement(P1, D1), "b")
    *stops, place = m.lost(dead)
    assert (stops, place.cause) == ([Send(tells, Stop("b"))], None)
    m.placed(Placement(P1, D1), "c")
    assert isinstance(m.lost(dead)[-1], Fail), "that is heard once"


def test_a_worker_that_dies_when_it_has_begun_again_costs_another_retry():
    m = machine(retries=1)
    m.start()
    m.placed(Placement(P1, D1), "a")
    m.event("d1", Failed("a", TransferFailed("torn")))
    m.placed(Placement(P1, D1), "b")
    m.event("p1", first("b", token(0)))
    assert isinstance(m.lost("p1")[-1], Fail)


def test_what_has_all_its_tokens_is_not_asked_of_another_when_a_worker_leaves():
    m = opened(max_tokens=2)
    m.event("p1", first("a", token(0)))
    m.event("d1", NewTokens("a", (token(1),)))
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    assert m.event("d1", Failed("a", Unavailable("draining"))) == [End(0, LENGTH), Succeed()]


def test_the_last_token_may_be_drawn_elsewhere_by_p_alone():
    m = opened(max_tokens=2)
    m.event("p1", first("a", token(0)))
    (move,) = m.event("p1", Movable("a"))
    assert move.demand.output_tokens == 1
    *_, to_p = m.moved(Placement(P2, None), "b", "a")
    assert to_p.command.destination is None
    actions = m.event("p2", first("b", token(1), ends={0: FinishReason.LENGTH}))
    assert actions == [Emit((token(1),)), End(0, LENGTH), Succeed()]
    assert m.event("p2", Finished("b")) == []


def test_what_waits_for_memory_can_go_to_a_decode_worker_with_less_to_do():
    m = opened()
    assert m.waits() is None, "P has not read it"
    assert m.share(frozenset({"d1"})) == []
    m.event("p1", first("a", token(0)))
    assert m.waits() == ("p1", "d1")
    (move,) = m.share(frozenset({"d1", "p2"}))
    assert move.demand.avoid == {"d1", "p2"}
    assert m.moved(Placement(P1, D1), "b", "a") == []
    m.share(frozenset({"d1", "p2"}))
    assert [action.worker_id for action in m.moved(Placement(P1, D2), "b", "a")] == ["p1", "d1", "d2", "p1"]
    m.event("p1", first("b", token(1)))
    m.event("p1", HandedOver("b", 1, 0.1, "shm"))
    assert m.waits() is None, "D has it"


MAX_TOKENS = 6
ERRORS = [TransferFailed("t"), Unavailable("u"), Cancelled("c"), Internal("i"), InvalidRequest("r")]


class Interleavings(RuleBasedStateMachine):
    """Workers that say anything there is a word for, late, twice and after the end; the promises are the invariants."""

    @initialize(retries=st.integers(0, 2), max_tokens=st.integers(1, MAX_TOKENS), n=st.integers(1, 3))
    def begin(self, retries, max_tokens, n):
        self.m = machine(max_tokens, retries, n)
        self.max_tokens, self.retries, self.n = max_tokens, retries, n
        self.open: dict[tuple[str, str], bool] = {}
        self.asked: dict[str, tuple[int, ...]] = {}
        self.sent: list[list[int]] = [[] for _ in range(n)]
        self.ended: dict[int, FinishReason] = {}
        self.terminals = 0
        self.wanted = self.retried = 0
        self.moves: list[Move] = []
        self.count = 0
        self.apply(self.m.start())

    def apply(self, actions):
        for action in actions:
            assert self.terminals == 0, f"{action} after the end"
            match action:
                case Place(demand, cause):
                    self.wanted += 1
                    self.retried += cause is not None
                    assert demand.choices == self.n - len(self.ended)
                    assert demand.output_tokens > 0
                case Move():
                    self.moves.append(action)
                case Send(worker, Stop(attempt, None)):
                    assert self.open[attempt, worker], "stopped what was closed"
                    self.open[attempt, worker] = False
                case Send(worker, Stop(attempt, choice)):
                    assert self.open[attempt, worker], "stopped a choice of what was closed"
                    assert choice in self.asked[attempt]
                case Send(worker, command):
                    assert command.request.generated in ((), tuple(tuple(sent) for sent in self.sent))
                    assert command.request.finished == set(self.ended)
                    self.open[command.attempt_id, worker] = True
                    self.asked[command.attempt_id] = command.request.live
                case Emit(tokens):
                    (choice,) = {t.choice for t in tokens}
                    assert choice not in self.ended
                    self.sent[choice].extend(t.id for t in tokens)
                case End(choice, reason):
                    assert choice not in self.ended
                    self.ended[choice] = reason
                case Succeed():
                    assert len(self.ended) == self.n
                    self.terminals += 1
                case Fail():
                    self.terminals += 1

    @precondition(lambda self: self.wanted and not self.terminals)
    @rule(data=st.data())
    def place(self, data):
        self.wanted -= 1
        if data.draw(st.booleans()) or data.draw(st.booleans()):
            p = data.draw(st.sampled_from([P1, P2, None]))
            one_left = self.n == 1 and self.max_tokens - len(self.sent[0]) == 1
            d = None if p and one_left else data.draw(st.sampled_from([D1, D2]))
            self.count += 1
            self.apply(self.m.placed(Placement(p, d), f"a{self.count}"))
        else:
            self.apply(self.m.unplaceable(Unavailable("nobody")))

    @precondition(lambda self: self.moves)
    @rule(data=st.data())
    def move(self, data):
        wanted = data.draw(st.sampled_from(self.moves))
        self.moves.remove(wanted)
        p = data.draw(st.sampled_from([P1, P2, None]))
        if actions := self.m.moved(Placement(p, data.draw(st.sampled_from([D1, D2]))), f"a{self.count + 1}", wanted.attempt_id):
            self.count += 1
            self.apply(actions)

    def answer(self, key, event, *, terminal=False):
        actions = self.m.event(key[1], event)
        if terminal and self.open.get(key):
            self.open[key] = False
        self.apply(actions)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), kind=st.sampled_from(["first", "tokens", "tokens", "handed", "choice", "finished", "movable", "failed", "lost"]))
    def worker_says(self, data, kind):
        key = data.draw(st.sampled_from(sorted(self.open)))
        attempt, worker = key
        choice = data.draw(st.integers(0, self.n - 1))
        reasons = st.sampled_from(FinishReason)
        if kind == "first":
            choices = data.draw(st.sets(st.integers(0, self.n - 1)))
            ends = {c: data.draw(st.none() | reasons) for c in choices}
            tokens = tuple(token(len(self.sent[c]), c) for c in choices)
            terminal = all(ends.get(c) for c in self.asked[attempt])
            self.answer(key, first(attempt, *tokens, ends=ends), terminal=terminal)
        elif kind == "tokens":
            index = data.draw(st.integers(0, self.max_tokens - 1))
            stop = data.draw(st.integers(index, self.max_tokens))
            self.answer(key, NewTokens(attempt, tuple(token(i, choice) for i in range(index, stop))))
        elif kind == "handed":
            self.answer(key, HandedOver(attempt, 1, 0.1, "shm"), terminal=True)
        elif kind == "choice":
            self.answer(key, ChoiceFinished(attempt, choice, data.draw(reasons)))
        elif kind == "finished":
            self.answer(key, Finished(attempt), terminal=True)
        elif kind == "movable":
            self.answer(key, Movable(attempt))
        elif kind == "failed":
            self.answer(key, Failed(attempt, data.draw(st.sampled_from(ERRORS))), terminal=True)
        else:
            for other in [k for k in self.open if k[1] == worker]:
                self.open[other] = False
            self.apply(self.m.lost(worker))

    @precondition(lambda self: self.open)
    @rule()
    def share(self):
        if waits := self.m.waits():
            self.apply(self.m.share(frozenset({waits[1]})))

    @precondition(lambda self: hasattr(self, "m"))
    @rule(how=st.sampled_from(["stop", "give_up", "nothing", "nothing", "nothing"]), choice=st.integers(0, 2))
    def router_ends(self, how, choice):
        if how == "stop":
            self.apply(self.m.stop(min(choice, self.n - 1)))
        elif how == "give_up":
            self.apply(self.m.give_up(Cancelled("gone")))

    @invariant()
    def promises(self):
        if not hasattr(self, "m"):
            return
        for choice, sent in enumerate(self.sent):
            assert sent == [token(i, choice).id for i in range(len(sent))]
        assert self.retried <= self.retries
        assert self.m.ended == (self.terminals == 1)
        if self.terminals:
            assert not any(self.open.values()), "an attempt was left open"
        newest = f"a{self.count}"
        assert not any(is_open for (attempt, _), is_open in self.open.items() if attempt != newest)
        if not self.terminals and not self.wanted:
            assert any(self.open.values()), "nobody is asked and nothing has ended"


Interleavings.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
test_interleavings = Interleavings.TestCase
