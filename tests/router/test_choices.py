"""Requests with several choices against workers that keep their word: whatever the interleaving, and whoever dies, the client gets each
choice's own tokens in order, each once, one end per choice, and one end of all."""

from collections import deque
from functools import partial

from diptych.core.commands import ChoiceFinished, Decode, Failed, Finished, FirstTokens, HandedOver, NewTokens, Prefill, Stop
from diptych.core.errors import Cancelled, TransferFailed, Unavailable
from diptych.core.fleet import Member, Phase
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.request import FinishReason, Request, Token, Tokens
from diptych.core.sampling import SamplingParams
from diptych.router.actions import Emit, End, Fail, Place, Send, Succeed
from diptych.router.machine import RequestMachine
from diptych.router.placement import Placement
from hypothesis import given, settings
from hypothesis import strategies as st

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


class World:
    """A router's machine, its workers and the streams between; one thing that may happen at a time."""

    def __init__(self, dice):
        self.dice = dice
        self.n, limit = dice.randint(1, MAX_CHOICES), dice.randint(1, MAX_TOKENS)
        self.script = Script([dice.randint(0, limit) for _ in range(self.n)], limit)
        request = Request("r", "m", (Tokens((1, 2, 3)),), SamplingParams(limit, seed=1, n=self.n))
        self.retries = dice.randint(0, 2)
        self.m = RequestMachine(request, retries=self.retries)
        self.misfortunes_left = dice.randint(0, 3)
        self.misfortunes = 0
        self.pace = {w.worker_id: dice.choice([1, 3, 12]) for w in (P1, P2, D1, D2)}
        """How often a worker and its stream are served: some lag far behind the others."""
        self.inbox = {w.worker_id: deque() for w in (P1, P2, D1, D2)}
        self.stream = {w: deque() for w in self.inbox}
        self.sides = {}
        self.open = set()
        self.sent = [[] for _ in range(self.n)]
        self.ends = {}
        self.stopped = set()
        self.outcome = None
        self.demand = None
        self.attempts = 0
        self.apply(self.m.start())

    def may_happen(self):
        """Every next thing, as a call without arguments; what happens often stands there often."""
        some = partial(self.dice.sample, range(self.n), self.dice.randint(1, self.n))
        happens = []
        for worker, pace in self.pace.items():
            happens += [partial(self.hear, worker)] * pace if self.inbox[worker] else []
            happens += [partial(self.deliver, worker)] * pace if self.stream[worker] else []
        for key, side in self.sides.items():
            if side.over:
                continue
            if isinstance(side, PrefillSide):
                happens += [partial(self.draw, key, side)] * 3 if self.ready(key, side) else []
            elif side.committed:
                happens += [lambda side=side: side.step(some())] * 6
            elif self.misfortunes < self.misfortunes_left:
                happens.append(partial(self.tear, key, side))
        if self.demand and not self.outcome:
            happens += [self.place] * 3
        if self.misfortunes < self.misfortunes_left:
            happens += [partial(self.die, worker) for worker in sorted({worker for _, worker in self.sides})]
        happens += [partial(self.stop_string, c) for c, sent in enumerate(self.sent) if sent and c not in self.ends and not self.outcome]
        return happens

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
                        assert command.request.finished == set(self.ends)
                        assert [command.request.generated_by(c) for c in range(self.n)] == [tuple(t.id for t in sent) for sent in self.sent]
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

    def place(self):
        demand, self.demand = self.demand, None
        prefill = None if demand.local else self.dice.choice([P1, P2, None])
        alone = prefill is not None and demand.output_tokens == 1
        self.attempts += 1
        self.apply(self.m.placed(Placement(prefill, None if alone else self.dice.choice([D1, D2])), f"a{self.attempts}"))

    def hear(self, worker):
        """A worker takes the next command from its stream."""
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

    def ready(self, key, side):
        """Whether P may draw: D has heard of the transfer, if there is to be one."""
        return side.drawn is None and (side.destination is None or self.peer(key) is not None)

    def draw(self, key, side):
        decode, left = self.peer(key), side.draw()
        if not left:
            side.end(Finished(side.attempt))
            if decode:
                decode.end(Failed(side.attempt, Cancelled("P cancelled")))
        else:
            assert decode, "P alone drew what is not the end"
            if not decode.over:
                decode.commit(left)
                side.end(HandedOver(side.attempt, 1, 0.1, "shm"))

    def deliver(self, worker):
        """The router hears the next event of a worker."""
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

    def tear(self, key, side):
        """A transfer fails on its way."""
        self.misfortunes += 1
        side.end(Failed(key[0], TransferFailed("torn")))
        self.fail_peer(key, TransferFailed("torn"))

    def stop_string(self, choice):
        """The client's stop string is found in what was sent."""
        self.stopped.add(choice)
        decoding = next((key for key in self.open if key[1] in ("d1", "d2")), None)
        self.apply(self.m.stop(choice))
        if decoding:
            told = self.inbox[decoding[1]][-1]
            assert told == Stop(decoding[0], None if self.outcome else choice), "D goes on with what is not wanted"

    def promises(self):
        for choice, sent in enumerate(self.sent):
            assert sent == [self.script.draw(choice, index)[0] for index in range(len(sent))]
            if choice in self.ends and choice not in self.stopped:
                assert len(sent) == self.script.lengths[choice]
                assert self.ends[choice] is self.script.reason(choice)
        assert all(self.ends[choice] is FinishReason.STOP for choice in self.stopped)
        assert self.m.ended == (self.outcome is not None)
        assert self.m.attempts <= 1 + self.misfortunes, "tried again for nothing"
        if self.outcome:
            assert not self.open
            assert self.misfortunes > self.retries or self.outcome == Succeed()
            assert isinstance(self.outcome, Fail) or len(self.ends) == self.n


@settings(max_examples=1500, deadline=None)
@given(st.randoms(use_true_random=True))
def test_whatever_the_interleaving(dice):
    world = World(dice)
    for _ in range(400):
        happens = world.may_happen()
        if not happens:
            break
        dice.choice(happens)()
        world.promises()
    assert world.outcome, "it never ended"
    assert not any(side.at and not side.over for side in world.sides.values()), "a worker still writes"
