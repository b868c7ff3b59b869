"""Requests with several choices against workers that keep their word: whatever the interleaving, and whoever dies, the client gets each
choice's own tokens in order, each once, one end per choice, and one end of all."""

from collections import deque

from diptych.core.commands import ChoiceFinished, Decode, Failed, Finished, FirstTokens, HandedOver, NewTokens, Prefill, Stop
from diptych.core.errors import Cancelled, TransferFailed, Unavailable
from diptych.core.fleet import Member, Phase
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.request import FinishReason, Request, Token, Tokens
from diptych.core.sampling import SamplingParams
from diptych.router.machine import Emit, End, Fail, Place, RequestMachine, Send, Succeed
from diptych.router.placement import Placement
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

LAYOUT = Layout("f", (CacheGroup(CacheKind.FULL, (0,), 1, 16, DType.FLOAT32),), 16, (64,))
P1, P2 = (Member(w, f"{w}:1", Phase.PREFILL, 1, LAYOUT, 1024) for w in ("p1", "p2"))
D1, D2 = (Member(w, f"{w}:1", Phase.DECODE, 1, LAYOUT, 1024) for w in ("d1", "d2"))
MAX_TOKENS, MAX_CHOICES = 5, 4
END_TOKEN = 2


class Script:
    """What every worker draws: choice c has `lengths[c]` tokens and then, unless it is at the limit, an end token."""

    def __init__(self, lengths, limit):
        self.lengths, self.limit = lengths, limit

    def reason(self, choice):
        return FinishReason.LENGTH if self.lengths[choice] == self.limit else FinishReason.STOP

    def draw(self, choice, index):
        """The token at `index`, and why the choice ends with it."""
        if index == self.lengths[choice]:
            return Token(index, END_TOKEN, choice=choice), FinishReason.STOP
        ends = FinishReason.LENGTH if index + 1 == self.limit else None
        return Token(index, 100 * (choice + 1) + index, choice=choice), ends


class Worker:
    """One worker's side of an attempt. What it says goes to its stream; `at`: index of the next token of each choice it writes."""

    def __init__(self, command, script, say):
        self.attempt, self.request, self.script, self.say = command.attempt_id, command.request, script, say
        self.over = False
        self.at = {choice: len(self.request.generated_by(choice)) for choice in self.request.live}

    def end(self, event):
        if not self.over:
            self.over = True
            self.say(event)

    def stop(self, choice):
        if choice is None:
            self.end(Failed(self.attempt, Cancelled("stopped")))
        elif self.at.pop(choice, None) is not None and not self.at and self.committed:
            self.end(Finished(self.attempt))


class PrefillSide(Worker):
    def __init__(self, command, script, say):
        super().__init__(command, script, say)
        self.destination = command.destination
        self.drawn = None

    def draw(self):
        """The first tokens; what is left of the choices for D."""
        self.drawn = {choice: self.script.draw(choice, self.at[choice]) for choice in self.request.opening}
        tokens, finishes = tuple(token for token, _ in self.drawn.values()), tuple(finish for _, finish in self.drawn.values())
        self.say(FirstTokens(self.attempt, tokens, finishes))
        return {c: at + (c in self.drawn) for c, at in self.at.items() if c not in self.drawn or self.drawn[c][1] is None}


class DecodeSide(Worker):
    def __init__(self, command, script, say):
        super().__init__(command, script, say)
        self.committed = command.local_prefill
        self.stopped = set()

    def commit(self, at):
        self.committed = True
        self.at = {choice: index for choice, index in at.items() if choice not in self.stopped}
        if not self.at:
            self.end(Finished(self.attempt))

    def stop(self, choice):
        self.stopped.add(choice)
        super().stop(choice)

    def step(self, choices):
        """One token of each of these choices."""
        tokens, ends = [], []
        for choice in [choice for choice in self.at if choice in choices]:
            token, end = self.script.draw(choice, self.at[choice])
            if end is not FinishReason.STOP:
                tokens.append(token)
            self.at[choice] += 1
            if end:
                ends.append(ChoiceFinished(self.attempt, choice, end))
                del self.at[choice]
        if tokens:
            self.say(NewTokens(self.attempt, tuple(tokens)))
        for event in ends:
            self.say(event)
        if not self.at:
            self.end(Finished(self.attempt))


class Choices(RuleBasedStateMachine):
    @initialize(data=st.data(), limit=st.integers(1, MAX_TOKENS), n=st.integers(1, MAX_CHOICES), retries=st.integers(0, 2))
    def begin(self, data, limit, n, retries):
        self.script = Script([data.draw(st.integers(0, limit)) for _ in range(n)], limit)
        self.m = RequestMachine(Request("r", "m", (Tokens((1, 2, 3)),), SamplingParams(limit, seed=1, n=n)), retries=retries)
        self.n = n
        self.inbox = {w.worker_id: deque() for w in (P1, P2, D1, D2)}
        self.stream = {w: deque() for w in self.inbox}
        self.sides = {}
        self.open = set()
        self.sent = [[] for _ in range(n)]
        self.ends = {}
        self.stopped = set()
        self.outcome = None
        self.demand = None
        self.attempts = 0
        self.misfortunes = 0
        self.apply(self.m.start())

    def apply(self, actions):
        for action in actions:
            assert self.outcome is None, f"{action} after the end"
            match action:
                case Place(demand, _):
                    self.demand = demand
                case Send(worker, command):
                    self.inbox[worker].append(command)
                    key = (command.attempt_id, worker)
                    if not isinstance(command, Stop):
                        self.open.add(key)
                    elif command.choice is None:
                        self.open.remove(key)
                case Emit(tokens):
                    (choice,) = {token.choice for token in tokens}
                    assert choice not in self.ends
                    self.sent[choice] += tokens
                case End(choice, reason):
                    assert choice not in self.ends, "a choice ended twice"
                    self.ends[choice] = reason
                case Succeed() | Fail():
                    self.outcome = action

    def place_on(self, prefill, decode):
        demand, self.demand = self.demand, None
        alone = demand.output_tokens == 1 and prefill is not None
        self.attempts += 1
        self.apply(
            self.m.placed(Placement(None if demand.local else prefill, None if alone and not demand.local else decode), f"a{self.attempts}")
        )

    @precondition(lambda self: self.demand and self.outcome is None)
    @rule(prefill=st.sampled_from([P1, P2, None]), decode=st.sampled_from([D1, D2]))
    def place(self, prefill, decode):
        self.place_on(prefill, decode)

    @rule(worker=st.sampled_from(["p1", "p2", "d1", "d2"]))
    def hear(self, worker):
        """A worker takes the next command from its stream."""
        if not self.inbox[worker]:
            return
        command = self.inbox[worker].popleft()
        key = (command.attempt_id, worker)
        match command:
            case Prefill():
                self.sides[key] = PrefillSide(command, self.script, self.stream[worker].append)
            case Decode():
                self.sides[key] = DecodeSide(command, self.script, self.stream[worker].append)
            case Stop(_, choice):
                if side := self.sides.get(key):
                    side.stop(choice)
                    if choice is None:
                        self.fail_peer(key, Cancelled("the other side cancelled"))

    def peer(self, key):
        """The other side of an attempt, if it is there."""
        return next((side for (attempt, worker), side in self.sides.items() if attempt == key[0] and worker != key[1]), None)

    def fail_peer(self, key, error):
        """One side is gone. Once D has committed it needs P no more."""
        other = self.peer(key)
        if other and not (isinstance(other, DecodeSide) and other.committed):
            other.end(Failed(key[0], error))

    @rule(worker=st.sampled_from(["p1", "p2"]))
    def prefill_draws(self, worker):
        for (attempt, where), side in list(self.sides.items()):
            if where != worker or side.over or side.drawn is not None:
                continue
            decode = self.peer((attempt, worker))
            if side.destination and decode is None:
                continue  # D has not heard of it: P has no grant
            left = side.draw()
            if not left:
                side.end(Finished(attempt))
                if decode:
                    decode.end(Failed(attempt, Cancelled("P cancelled")))
            else:
                assert decode, "P alone drew what is not the end"
                if not decode.over:
                    decode.commit(left)
                    side.end(HandedOver(attempt, 1, 0.1, "shm"))

    @rule(worker=st.sampled_from(["d1", "d2"]), choices=st.sets(st.integers(0, MAX_CHOICES - 1), min_size=1))
    def decode_steps(self, worker, choices):
        for (_, where), side in list(self.sides.items()):
            if where == worker and side.committed and not side.over:
                side.step(choices)

    @rule(worker=st.sampled_from(["p1", "p2", "d1", "d2"]))
    def deliver(self, worker):
        """The router hears the next event of a worker."""
        if not self.stream[worker]:
            return
        event = self.stream[worker].popleft()
        key = (event.attempt_id, worker)
        current = self.open.copy()
        if isinstance(event, HandedOver | Finished | Failed):
            self.open.discard(key)
        elif isinstance(event, FirstTokens) and key in current:
            asked = self.sides[key].request.live
            if all(dict(zip((t.choice for t in event.tokens), event.finishes, strict=True)).get(choice) for choice in asked):
                self.open.discard(key)
        self.apply(self.m.event(worker, event))

    @rule(worker=st.sampled_from(["p1", "p2", "d1", "d2"]))
    def die(self, worker):
        """A worker restarts: its stream, and all that was on it, is gone."""
        self.misfortunes += 1
        self.inbox[worker].clear()
        self.stream[worker].clear()
        for key in [key for key in self.sides if key[1] == worker]:
            self.fail_peer(key, Unavailable("the other side is gone"))
            del self.sides[key]
        self.open = {key for key in self.open if key[1] != worker}
        self.apply(self.m.lost(worker))

    @rule(worker=st.sampled_from(["d1", "d2"]))
    def tear(self, worker):
        """A transfer fails on its way."""
        for key, side in list(self.sides.items()):
            if key[1] == worker and not side.committed and not side.over:
                self.misfortunes += 1
                side.end(Failed(key[0], TransferFailed("torn")))
                self.fail_peer(key, TransferFailed("torn"))

    @rule(choice=st.integers(0, MAX_CHOICES - 1))
    def stop_string(self, choice):
        """The client's stop string is found in what was sent."""
        if choice < self.n and self.sent[choice] and choice not in self.ends:
            self.stopped.add(choice)
            self.apply(self.m.stop(choice))

    @invariant()
    def promises(self):
        if not hasattr(self, "m"):
            return
        for choice, sent in enumerate(self.sent):
            assert sent == [self.script.draw(choice, index)[0] for index in range(len(sent))]
            if choice in self.ends and choice not in self.stopped:
                assert len(sent) == self.script.lengths[choice]
                assert self.ends[choice] is self.script.reason(choice)
        assert all(self.ends[choice] is FinishReason.STOP for choice in self.stopped)
        assert self.m.ended == (self.outcome is not None)
        if self.outcome:
            assert not self.open
            assert self.misfortunes or self.outcome == Succeed()
            assert isinstance(self.outcome, Fail) or len(self.ends) == self.n

    def teardown(self):
        """Nobody dies any more: it ends."""
        if not hasattr(self, "m"):
            return
        for _ in range(100):
            if self.outcome:
                break
            if self.demand:
                self.place_on(P1, D1)
            for worker in self.inbox:
                self.hear(worker)
            for worker in ("p1", "p2"):
                self.prefill_draws(worker)
            for worker in ("d1", "d2"):
                self.decode_steps(worker, set(range(MAX_CHOICES)))
            for worker in self.inbox:
                self.deliver(worker)
        assert self.outcome, "it never ended"
        self.promises()


Choices.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
test_choices = Choices.TestCase
