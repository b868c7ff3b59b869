"""The request machine: scenarios by hand, then random interleavings under which its promises must hold."""

import pytest
from diptych.core.commands import Decode, Failed, Finished, FirstToken, HandedOver, NewTokens, Prefill, Stop
from diptych.core.errors import Cancelled, Internal, InvalidRequest, TransferFailed, Unavailable
from diptych.core.fleet import Member, Phase
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.request import FinishReason, Request, Token, Tokens
from diptych.core.sampling import SamplingParams
from diptych.router.machine import Emit, Fail, Place, RequestMachine, Send, Succeed
from diptych.router.placement import Placement
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

LAYOUT = Layout("f", (CacheGroup(CacheKind.FULL, (0,), 1, 16, DType.FLOAT32),), 16, (64,))
P1, P2 = (Member(w, f"{w}:1", Phase.PREFILL, 1, LAYOUT, 1024) for w in ("p1", "p2"))
D1, D2 = (Member(w, f"{w}:1", Phase.DECODE, 1, LAYOUT, 1024) for w in ("d1", "d2"))


def machine(max_tokens=8, retries=2):
    request = Request("r", "m", (Tokens((1, 2, 3)),), SamplingParams(max_tokens=max_tokens, seed=1))
    return RequestMachine(request, retries=retries)


def opened(max_tokens=8):
    m = machine(max_tokens)
    m.start()
    m.placed(Placement(P1, D1), "a")
    return m


def token(index):
    return Token(index, 100 + index)


def test_disaggregated_request_from_start_to_end():
    m = machine()
    (place,) = m.start()
    assert place.demand.context_tokens == 3
    assert place.demand.output_tokens == 8
    assert place.cause is None
    to_d, to_p = m.placed(Placement(P1, D1), "a")
    assert to_d == Send("d1", Decode("a", m.request))
    assert to_p == Send("p1", Prefill("a", m.request, "d1:1"))
    assert m.event("p1", FirstToken("a", token(0), cached_tokens=2)) == [Emit((token(0),))]
    handed = HandedOver("a", 100, 0.01, "shm")
    assert m.event("p1", handed) == []
    assert m.event("d1", NewTokens("a", (token(1), token(2)))) == [Emit((token(1), token(2)))]
    assert m.event("d1", Finished("a", FinishReason.STOP)) == [Succeed(FinishReason.STOP)]
    assert (m.handed_over, m.cached_tokens, m.attempts) == (handed, 2, 1)
    assert m.lost("d1") == m.stop() == m.give_up(Cancelled("x")) == []


def test_second_token_waits_for_the_first():
    m = opened()
    assert m.event("d1", NewTokens("a", (token(1),))) == []
    assert m.event("p1", FirstToken("a", token(0))) == [Emit((token(0), token(1)))]


def test_the_end_waits_for_the_word_of_p():
    m = opened()
    m.event("p1", FirstToken("a", token(0)))
    assert m.event("d1", Finished("a", FinishReason.STOP)) == []
    assert m.event("p1", HandedOver("a", 1, 0.1, "shm")) == [Succeed(FinishReason.STOP)]


@pytest.mark.parametrize("end", [Failed("a", TransferFailed("no ack")), None])
def test_p_may_die_once_d_decodes(end):
    m = opened()
    m.event("p1", FirstToken("a", token(0)))
    m.event("d1", NewTokens("a", (token(1),)))
    assert (m.event("p1", end) if end else m.lost("p1")) == []
    assert m.event("d1", Finished("a", FinishReason.LENGTH)) == [Succeed(FinishReason.LENGTH)]


def test_one_token_is_for_p_alone():
    m = machine(max_tokens=1)
    m.start()
    assert m.placed(Placement(P1, None), "a") == [Send("p1", Prefill("a", m.request, None))]
    actions = m.event("p1", FirstToken("a", token(0), FinishReason.LENGTH))
    assert actions == [Emit((token(0),)), Succeed(FinishReason.LENGTH)]
    assert m.event("p1", Finished("a", FinishReason.LENGTH)) == []


def test_an_end_token_as_the_first_is_not_output_and_d_is_stopped():
    m = opened()
    actions = m.event("p1", FirstToken("a", token(0), FinishReason.STOP))
    assert actions == [Send("d1", Stop("a")), Succeed(FinishReason.STOP)]


def test_d_cancelled_by_p_waits_for_the_reason():
    m = opened()
    assert m.event("d1", Failed("a", Cancelled("P cancelled"))) == []
    assert m.event("p1", FirstToken("a", token(0), FinishReason.STOP)) == [Succeed(FinishReason.STOP)]
    m = opened()
    m.event("d1", Failed("a", Cancelled("P cancelled")))
    (place,) = m.event("p1", Failed("a", Internal("broke")))
    assert isinstance(place, Place)


def test_retry_resumes_after_what_was_sent_and_avoids_the_dead():
    m = opened()
    m.event("p1", FirstToken("a", token(0)))
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    m.event("d1", NewTokens("a", (token(1),)))
    (place,) = m.lost("d1")
    assert (place.demand.context_tokens, place.demand.output_tokens) == (5, 6)
    assert place.demand.avoid == {"d1"}
    assert not place.demand.local
    to_d, to_p = m.placed(Placement(P1, D2), "b")
    assert to_p.command.request.generated == (100, 101)
    assert to_d.command.request.prompt == m.request.prompt
    assert m.event("d1", NewTokens("a", (token(2),))) == []
    assert m.event("p1", FirstToken("b", token(2))) == [Emit((token(2),))]


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
    m.event("p1", FirstToken("a", token(0)))
    m.event("p1", HandedOver("a", 1, 0.1, "shm"))
    m.event("d1", NewTokens("a", (token(1),)))
    assert m.lost("d1") == [Succeed(FinishReason.LENGTH)]


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


MAX_TOKENS = 6
ERRORS = [TransferFailed("t"), Unavailable("u"), Cancelled("c"), Internal("i"), InvalidRequest("r")]
MEMBERS = {m.worker_id: m for m in (P1, P2, D1, D2)}


class Interleavings(RuleBasedStateMachine):
    """Workers that say anything the contract lets them say, late, twice and after the end; the promises are the invariants."""

    @initialize(retries=st.integers(0, 2), max_tokens=st.integers(1, MAX_TOKENS))
    def begin(self, retries, max_tokens):
        self.m = machine(max_tokens, retries)
        self.max_tokens = max_tokens
        self.retries = retries
        self.open: dict[tuple[str, str], bool] = {}
        self.sent: list[int] = []
        self.terminals = 0
        self.wanted = 0
        self.count = 0
        self.apply(self.m.start())

    def apply(self, actions):
        for action in actions:
            assert self.terminals == 0, f"{action} after the end"
            match action:
                case Place():
                    self.wanted += 1
                case Send(worker, Stop(attempt)):
                    assert self.open[attempt, worker], "stopped what was closed"
                    self.open[attempt, worker] = False
                case Send(worker, command):
                    assert list(command.request.generated) == [100 + i for i in range(len(self.sent))]
                    self.open[command.attempt_id, worker] = True
                case Emit(tokens):
                    self.sent.extend(t.index for t in tokens)
                case Succeed() | Fail():
                    self.terminals += 1

    @precondition(lambda self: self.wanted and not self.terminals)
    @rule(data=st.data())
    def place(self, data):
        self.wanted -= 1
        if data.draw(st.booleans()) or data.draw(st.booleans()):
            p = data.draw(st.sampled_from([P1, P2, None]))
            one_left = self.max_tokens - len(self.sent) == 1
            d = None if p and one_left else data.draw(st.sampled_from([D1, D2]))
            self.count += 1
            self.apply(self.m.placed(Placement(p, d), f"a{self.count}"))
        else:
            self.apply(self.m.unplaceable(Unavailable("nobody")))

    def answer(self, key, event, *, terminal=False):
        actions = self.m.event(key[1], event)
        if terminal and self.open.get(key):
            self.open[key] = False
        self.apply(actions)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), kind=st.sampled_from(["first", "first_end", "tokens", "handed", "finished", "failed", "lost"]))
    def worker_says(self, data, kind):
        key = data.draw(st.sampled_from(sorted(self.open)))
        attempt, worker = key
        index = data.draw(st.integers(0, self.max_tokens - 1))
        if kind == "first":
            self.answer(key, FirstToken(attempt, token(len(self.sent))))
        elif kind == "first_end":
            reason = data.draw(st.sampled_from(FinishReason))
            self.answer(key, FirstToken(attempt, token(len(self.sent)), reason), terminal=True)
        elif kind == "tokens":
            stop = data.draw(st.integers(index, self.max_tokens))
            self.answer(key, NewTokens(attempt, tuple(token(i) for i in range(index, stop))))
        elif kind == "handed":
            self.answer(key, HandedOver(attempt, 1, 0.1, "shm"), terminal=True)
        elif kind == "finished":
            self.answer(key, Finished(attempt, FinishReason.STOP), terminal=True)
        elif kind == "failed":
            self.answer(key, Failed(attempt, data.draw(st.sampled_from(ERRORS))), terminal=True)
        else:
            for other in [k for k in self.open if k[1] == worker]:
                self.open[other] = False
            self.apply(self.m.lost(worker))

    @precondition(lambda self: hasattr(self, "m"))
    @rule(how=st.sampled_from(["stop", "give_up", "nothing", "nothing", "nothing"]))
    def router_ends(self, how):
        if how == "stop":
            self.apply(self.m.stop())
        elif how == "give_up":
            self.apply(self.m.give_up(Cancelled("gone")))

    @invariant()
    def promises(self):
        if not hasattr(self, "m"):
            return
        assert self.sent == list(range(len(self.sent)))
        assert self.m.attempts <= 1 + self.retries
        assert self.m.ended == (self.terminals == 1)
        if self.terminals:
            assert not any(self.open.values()), "an attempt was left open"
        newest = f"a{self.count}"
        assert not any(is_open for (attempt, _), is_open in self.open.items() if attempt != newest)
        if not self.terminals and not self.wanted:
            assert any(self.open.values()), "nobody is asked and nothing has ended"


Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_interleavings = Interleavings.TestCase
