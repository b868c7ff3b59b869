"""The life of one request in the router, as a pure machine: events in, actions out.

    start ─▶ Place ─▶ placed ─▶ Send(Decode), Send(Prefill) ─▶ events ─▶ Emit …, End ─▶ Succeed or Fail, once
                ▲                                            │             per choice
                ├────────── an attempt failed: Place ◀───────┤      at most `retries` times, the last with local prefill
                └─ a worker leaves: Place, or Move ─▶ moved ◀┘      which costs no retry

One attempt carries all choices that have not ended. What holds whatever comes in, in whatever order: one terminal action; token i of
a choice is emitted once, after i-1, whichever stream brings it; a choice ends once, behind its last token, and all have ended before
Succeed; every side of every attempt that was opened is closed, by its own terminal event, by the loss of its stream or by a Stop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.commands import (
    ChoiceFinished,
    Decode,
    Event,
    Failed,
    Finished,
    FirstTokens,
    HandedOver,
    Movable,
    NewTokens,
    Prefill,
    Stop,
)
from ..core.errors import Cancelled, DeadlineExceeded, DiptychError, Internal, InvalidRequest, NotFound, TransferFailed, Unavailable
from ..core.request import FinishReason, Request, Token
from .actions import Action, Emit, End, Fail, Move, Place, Send, Succeed
from .outputs import Output
from .placement import Demand, Placement

MAX_HELD_TOKENS = 1024
"""Tokens of D kept of a choice while P's first one is on its way. D is ahead by a stream's delay, a few steps; this many is a defect."""

_FINAL = (InvalidRequest, NotFound, DeadlineExceeded)
"""Failures that another attempt would only repeat."""


@dataclass(slots=True)
class _Side:
    """One worker's part in an attempt; `open` until it ended or we ended it."""

    worker_id: str
    open: bool = True


@dataclass(slots=True)
class _Attempt:
    id: str
    choices: tuple[int, ...]
    """Those it writes."""
    prefill: _Side | None
    decode: _Side | None
    decoding: bool = False
    """D has drawn a token or an end, so it has the KV: what becomes of P no longer matters."""
    leaving: _Side | None = None
    """Whose worker leaves, or has too much, and has not begun with it."""
    heard: bool = False
    """A worker has said something of it."""
    doubt: DiptychError | None = None
    """D was cancelled by P, and P's own word on why is still on its way."""

    def sides(self) -> tuple[_Side, ...]:
        return tuple(side for side in (self.prefill, self.decode) if side)


class RequestMachine:
    """See the module. All methods return the actions to perform, in order."""

    def __init__(self, request: Request, *, retries: int) -> None:
        self.request = request
        self.attempts = 0
        """Attempts opened so far."""
        self._free = 0
        """Of them, those that a worker ended before it had begun: it left, or its end had been counted. No failures."""
        self.placement: Placement | None = None
        """Of the latest attempt."""
        self.handed_over: HandedOver | None = None
        """Of the latest attempt that moved KV."""
        self.cached_tokens = 0
        self._most_attempts = 1 + retries
        self._outputs = [Output() for _ in range(request.sampling.n)]
        self._attempt: _Attempt | None = None
        self._avoid: frozenset[str] = frozenset()
        self._suspects: frozenset[str] = frozenset()
        """The two between which the attempt before failed to move KV: one may be dead, and the end of its stream still to come."""
        self._started = False
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    def start(self) -> list[Action]:
        """The request is accepted."""
        if self._started:
            raise RuntimeError(f"request {self.request.request_id} was started twice")
        self._started = True
        return [self._place(None)]

    def placed(self, placement: Placement, attempt_id: str) -> list[Action]:
        """Open an attempt on these workers under a fresh id. D is told first: its Decode should be there before P's Offer."""
        if self._ended or self._attempt:
            return []
        self.attempts += 1
        self.placement = placement
        self.handed_over = None
        prefill = _Side(placement.prefill.worker_id) if placement.prefill else None
        decode = _Side(placement.decode.worker_id) if placement.decode else None
        request = self._remaining()
        for choice, output in enumerate(self._outputs):
            output.begin(awaits_first=prefill is not None and choice in request.opening)
        self._attempt = _Attempt(attempt_id, request.live, prefill, decode)
        actions: list[Action] = []
        if decode:
            actions.append(Send(decode.worker_id, Decode(attempt_id, request, local_prefill=prefill is None)))
        if prefill:
            destination = placement.decode.address if placement.decode else None
            actions.append(Send(prefill.worker_id, Prefill(attempt_id, request, destination)))
        return actions

    def unplaceable(self, error: DiptychError) -> list[Action]:
        """Nobody can take the attempt that was asked for, or no retry is left in the fleet's budget."""
        return [] if self._attempt else self._fail(error)

    def event(self, worker_id: str, event: Event) -> list[Action]:
        """A worker said something. Events of closed attempts and closed sides are dropped."""
        attempt = self._attempt
        if self._ended or attempt is None or event.attempt_id != attempt.id:
            return []
        side = next((side for side in attempt.sides() if side.worker_id == worker_id and side.open), None)
        if side is None:
            return []
        attempt.heard = True
        match event:
            case FirstTokens():
                return self._first_tokens(attempt, side, event)
            case NewTokens():
                attempt.decoding = True
                return self._take(event.tokens) + self._settle(attempt)
            case ChoiceFinished():
                attempt.decoding = True
                self._outputs[event.choice].finish = event.finish
                return self._settle(attempt)
            case HandedOver():
                side.open = False
                self.handed_over = event
                return self._next_attempt(attempt.doubt) if attempt.doubt else self._settle(attempt)
            case Finished():
                side.open = False
                attempt.decoding = attempt.decoding or side is attempt.decode
                self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
                return self._settle(attempt)
            case Movable():
                return self._movable(attempt, side)
            case Failed():
                return self._refused(side) if self._leaves(side, event.error) else self._failed(attempt, side, event.error)

    def moved(self, placement: Placement, attempt_id: str, of: str) -> list[Action]:
        """Here the attempt `of`, which need not stay where it is, could go on under a fresh id. It stays if it is over by now, or if
        this is that worker again, or if the prompt would be read where it is not to be."""
        attempt = self._attempt
        if attempt is None or attempt.id != of or attempt.leaving is None or attempt.decoding:
            return []
        leaving, attempt.leaving = attempt.leaving, None
        workers = {member.worker_id for member in (placement.prefill, placement.decode) if member}
        if leaving.worker_id in workers or (placement.prefill is None) != (attempt.prefill is None):
            return []
        self._avoid |= {leaving.worker_id}
        self._free += 1
        return [*self._close(), *self.placed(placement, attempt_id)]

    def waits(self) -> tuple[str, str] | None:
        """Who has the KV, and the decode worker whose memory it waits for, as far as can be told from here."""
        attempt = self._attempt
        if attempt is None or attempt.decoding or attempt.doubt or attempt.prefill is None or attempt.decode is None:
            return None
        if not attempt.prefill.open or any(output.awaits_first for output in self._outputs if output.live):
            return None
        return attempt.prefill.worker_id, attempt.decode.worker_id

    def share(self, avoid: frozenset[str]) -> list[Action]:
        """Another decode worker has less to do than the one it waits for. What to do if the attempt `waits`."""
        attempt = self._attempt
        if attempt is None or self.waits() is None:
            return []
        attempt.leaving = attempt.decode
        return [Move(attempt.id, self._demand(self._avoid | avoid, local=False))]

    def lost(self, worker_id: str) -> list[Action]:
        """The stream to this worker ended: it has stopped everything of ours."""
        attempt = self._attempt
        if self._ended or attempt is None:
            return []
        side = next((side for side in attempt.sides() if side.worker_id == worker_id and side.open), None)
        if side is None:
            return []
        if worker_id in self._suspects and not attempt.heard:
            return self._refused(side)
        return self._failed(attempt, side, Unavailable(f"The connection to worker {worker_id} was lost."))

    def stop(self, choice: int) -> list[Action]:
        """The text of this choice is complete (a stop string): nothing more of it is wanted."""
        output, attempt = self._outputs[choice], self._attempt
        if self._ended or not output.live:
            return []
        output.close(FinishReason.STOP)
        end = End(choice, FinishReason.STOP)
        if self._complete:
            return [end, *self._end(Succeed())]
        if attempt and attempt.decode and attempt.decode.open:
            return [end, Send(attempt.decode.worker_id, Stop(attempt.id, choice))]
        return [end]

    def give_up(self, error: DiptychError) -> list[Action]:
        """The client is gone, the time is up, the router ends."""
        return self._fail(error)

    @property
    def _complete(self) -> bool:
        return not any(output.live for output in self._outputs)

    def _remaining(self) -> Request:
        """What is left of the request for an attempt to write."""
        began = any(output.emitted for output in self._outputs)
        generated = tuple(tuple(output.emitted) for output in self._outputs) if began else ()
        finished = frozenset(choice for choice, output in enumerate(self._outputs) if not output.live)
        return replace(self.request, generated=generated, finished=finished)

    def _place(self, cause: DiptychError | None) -> Place:
        last = self._spent + 1 == self._most_attempts and self._most_attempts > 1
        return Place(self._demand(self._avoid, local=last), cause)

    def _demand(self, avoid: frozenset[str], *, local: bool) -> Demand:
        request = self._remaining()
        shared = len(request.token_ids)
        return Demand(
            context_tokens=shared,
            output_tokens=len(request.prompt_ids) + request.sampling.max_tokens - shared,
            choices=len(request.live),
            avoid=avoid,
            local=local,
        )

    @property
    def _spent(self) -> int:
        """Attempts that count against the retries."""
        return self.attempts - self._free

    def _first_tokens(self, attempt: _Attempt, side: _Side, event: FirstTokens) -> list[Action]:
        self.cached_tokens = event.cached_tokens
        finishes = {token.choice: finish for token, finish in zip(event.tokens, event.finishes, strict=True)}
        for choice, finish in finishes.items():
            self._outputs[choice].awaits_first = False
            self._outputs[choice].finish = finish or self._outputs[choice].finish
        # An end token is not part of the output; the last token that fits is.
        actions = self._take(tuple(token for token in event.tokens if finishes[token.choice] is not FinishReason.STOP))
        if all(finishes.get(choice) for choice in attempt.choices):
            # P cancels the transfer itself; whatever D says of that is settled.
            side.open = False
            actions += self._end_choices()
            if self._complete:
                return actions + self._end(Succeed())
        return actions + self._settle(attempt)

    def _take(self, tokens: tuple[Token, ...]) -> list[Action]:
        """Emit what continues an output without a gap; hold what is ahead; drop what was emitted before."""
        for token in tokens:
            self._outputs[token.choice].take(token)
        choices = dict.fromkeys(token.choice for token in tokens)
        return [Emit(ready) for choice in choices if (ready := self._outputs[choice].ready())]

    def _end_choices(self) -> list[Action]:
        """The choices of which all has come."""
        ended: list[Action] = []
        for choice, output in enumerate(self._outputs):
            if output.live and output.finish and output.whole:
                output.close(output.finish)
                ended.append(End(choice, output.finish))
        return ended

    def _settle(self, attempt: _Attempt) -> list[Action]:
        """End if the output is complete. P's last word is waited for: it says what the transfer was, and comes within a lease."""
        ended = self._end_choices()
        most = max(len(output.held) for output in self._outputs)
        if most > MAX_HELD_TOKENS:
            return ended + self._next_attempt(Internal(f"{most} tokens of a choice came before its first one."))
        if any(side.open for side in attempt.sides()):
            return ended
        if self._complete:
            return ended + self._end(Succeed())
        if any(output.live and not output.whole for output in self._outputs):
            return ended + self._next_attempt(TransferFailed("A first token of the attempt never came."))
        return ended + self._next_attempt(Internal("The attempt ended without an end."))

    def _movable(self, attempt: _Attempt, side: _Side) -> list[Action]:
        if attempt.decoding or attempt.doubt:
            return []
        attempt.leaving = side
        return [Move(attempt.id, self._demand(self._avoid | {side.worker_id}, local=False))]

    def _leaves(self, side: _Side, error: DiptychError) -> bool:
        """Whether the attempt came to a worker that leaves. From one worker that is heard once; then it is a failure like any other."""
        return isinstance(error, Unavailable) and side.worker_id not in self._avoid

    def _refused(self, side: _Side) -> list[Action]:
        side.open = False
        self._avoid |= {side.worker_id}
        self._suspects = frozenset()
        self._free += 1
        return self._next_attempt(None)

    def _failed(self, attempt: _Attempt, side: _Side, error: DiptychError) -> list[Action]:
        side.open = False
        whole = all(output.whole for output in self._outputs if output.live)
        if side is attempt.prefill and attempt.decoding and whole and not attempt.doubt:
            return self._settle(attempt)
        if side is attempt.decode and isinstance(error, Cancelled) and attempt.prefill and attempt.prefill.open:
            attempt.doubt = error
            return []
        both = frozenset(each.worker_id for each in attempt.sides())
        self._suspects = both if isinstance(error, TransferFailed) else frozenset()
        self._avoid |= self._suspects or {side.worker_id}
        return self._next_attempt(error)

    def _next_attempt(self, error: DiptychError | None) -> list[Action]:
        """`error` None: nothing has failed."""
        ended = self._end_full()
        if self._complete:
            return ended + self._end(Succeed())
        if isinstance(error, _FINAL):
            return ended + self._fail(error)
        if error and self._spent >= self._most_attempts:
            return ended + self._fail(_last_word(error, self._spent))
        return [*ended, *self._close(), self._place(error)]

    def _end_full(self) -> list[Action]:
        """The choices that have all their tokens, and lack only the word that says so."""
        ended: list[Action] = []
        for choice, output in enumerate(self._outputs):
            if output.live and len(output.emitted) >= self.request.sampling.max_tokens:
                output.close(FinishReason.LENGTH)
                ended.append(End(choice, FinishReason.LENGTH))
        return ended

    def _fail(self, error: DiptychError) -> list[Action]:
        return self._end(Fail(error))

    def _end(self, action: Succeed | Fail) -> list[Action]:
        if self._ended:
            return []
        self._ended = True
        return [*self._close(), action]

    def _close(self) -> list[Action]:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return []
        return [Send(side.worker_id, Stop(attempt.id)) for side in attempt.sides() if side.open]


def _last_word(error: DiptychError, attempts: int) -> DiptychError:
    """What the client is told when no attempt is left. A worker's `Cancelled` is not the client's doing, so it is not called that."""
    if isinstance(error, Cancelled):
        return Unavailable(f"The request failed {attempts} times: {error.message}")
    return error
