"""The life of one request in the router, as a pure machine: events in, actions out.

    start ─▶ Place ─▶ placed ─▶ Send(Decode), Send(Prefill) ─▶ events ─▶ Emit … ─▶ Succeed or Fail, once
                ▲                                            │
                └────────── an attempt failed: Place ◀───────┘      at most `retries` times, the last with local prefill

What holds whatever comes in, in whatever order: one terminal action; output token i is emitted once, after i-1, whichever stream
brings it; every side of every attempt that was opened is closed, by its own terminal event, by the loss of its stream or by a Stop.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..core.commands import Command, Decode, Event, Failed, Finished, FirstToken, HandedOver, NewTokens, Prefill, Stop
from ..core.errors import Cancelled, DeadlineExceeded, DiptychError, Internal, InvalidRequest, NotFound, TransferFailed, Unavailable
from ..core.request import FinishReason, Request, Token
from .placement import Demand, Placement

MAX_HELD_TOKENS = 1024
"""Tokens of D kept while P's first token is still on its way. D is ahead by a stream's delay, a few steps; this many is a defect."""

_FINAL = (InvalidRequest, NotFound, DeadlineExceeded)
"""Failures that another attempt would only repeat."""


@dataclass(frozen=True, slots=True)
class Place:
    """Wanted: `placed` or `unplaceable`. `cause` is the failure that makes it a retry, None for the first attempt."""

    demand: Demand
    cause: DiptychError | None


@dataclass(frozen=True, slots=True)
class Send:
    worker_id: str
    command: Command


@dataclass(frozen=True, slots=True)
class Emit:
    """The next output tokens, in order."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Succeed:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    error: DiptychError


Action = Place | Send | Emit | Succeed | Fail


@dataclass(slots=True)
class _Side:
    """One worker's part in an attempt; `open` until it ended or we ended it."""

    worker_id: str
    open: bool = True


@dataclass(slots=True)
class _Attempt:
    id: str
    first_index: int
    prefill: _Side | None
    decode: _Side | None
    held: dict[int, Token] = field(default_factory=dict)
    finish: FinishReason | None = None
    decoding: bool = False
    """D has drawn a token or an end, so it has the KV: what becomes of P no longer matters."""
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
        self.placement: Placement | None = None
        """Of the latest attempt."""
        self.handed_over: HandedOver | None = None
        """Of the latest attempt that moved KV."""
        self.cached_tokens = 0
        self._most_attempts = 1 + retries
        self._emitted: list[int] = list(request.generated)
        self._attempt: _Attempt | None = None
        self._avoid: frozenset[str] = frozenset()
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
        request = replace(self.request, generated=tuple(self._emitted))
        prefill = _Side(placement.prefill.worker_id) if placement.prefill else None
        decode = _Side(placement.decode.worker_id) if placement.decode else None
        self._attempt = _Attempt(attempt_id, len(self._emitted), prefill, decode)
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
        match event:
            case FirstToken():
                return self._first_token(attempt, side, event)
            case NewTokens():
                attempt.decoding = True
                return self._take(attempt, event.tokens) + self._settle(attempt)
            case HandedOver():
                side.open = False
                self.handed_over = event
                return self._next_attempt(attempt.doubt) if attempt.doubt else self._settle(attempt)
            case Finished():
                side.open = False
                attempt.finish = event.finish
                attempt.decoding = attempt.decoding or side is attempt.decode
                self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
                return self._settle(attempt)
            case Failed():
                return self._failed(attempt, side, event.error)

    def lost(self, worker_id: str) -> list[Action]:
        """The stream to this worker ended: it has stopped everything of ours."""
        attempt = self._attempt
        if self._ended or attempt is None:
            return []
        side = next((side for side in attempt.sides() if side.worker_id == worker_id and side.open), None)
        if side is None:
            return []
        return self._failed(attempt, side, Unavailable(f"The connection to worker {worker_id} was lost."))

    def stop(self) -> list[Action]:
        """The text is complete (a stop string): nothing more is wanted."""
        return self._end(Succeed(FinishReason.STOP))

    def give_up(self, error: DiptychError) -> list[Action]:
        """The client is gone, the time is up, the router ends."""
        return self._fail(error)

    def _place(self, cause: DiptychError | None) -> Place:
        last = self.attempts + 1 == self._most_attempts and self._most_attempts > 1
        demand = Demand(
            context_tokens=len(self.request.prompt_ids) + len(self._emitted),
            output_tokens=self.request.sampling.max_tokens - len(self._emitted),
            avoid=self._avoid,
            local=last,
        )
        return Place(demand, cause)

    def _first_token(self, attempt: _Attempt, side: _Side, event: FirstToken) -> list[Action]:
        self.cached_tokens = event.cached_tokens
        if event.finish is None:
            return self._take(attempt, (event.token,)) + self._settle(attempt)
        # P cancels the transfer itself; whatever D says of that is settled.
        side.open = False
        # An end token is not part of the output; the last token that fits is.
        taken = self._take(attempt, (event.token,)) if event.finish is FinishReason.LENGTH else []
        return taken + self._end(Succeed(event.finish))

    def _take(self, attempt: _Attempt, tokens: tuple[Token, ...]) -> list[Action]:
        """Emit what continues the output without a gap; hold what is ahead; drop what was emitted before."""
        for token in tokens:
            if token.index >= len(self._emitted):
                attempt.held[token.index] = token
        ready: list[Token] = []
        while following := attempt.held.pop(len(self._emitted), None):
            ready.append(following)
            self._emitted.append(following.id)
        return [Emit(tuple(ready))] if ready else []

    def _settle(self, attempt: _Attempt) -> list[Action]:
        """End if the output is complete. P's last word is waited for: it says what the transfer was, and comes within a lease."""
        if len(attempt.held) > MAX_HELD_TOKENS:
            return self._next_attempt(Internal(f"{len(attempt.held)} tokens came before the first one."))
        if attempt.finish is None:
            return [] if any(side.open for side in attempt.sides()) else self._next_attempt(Internal("The attempt ended without an end."))
        if attempt.prefill and attempt.prefill.open:
            return []
        first_missing = attempt.prefill and attempt.decode and len(self._emitted) == attempt.first_index
        if attempt.held or first_missing:
            return self._next_attempt(TransferFailed("The first token of the attempt never came."))
        return self._end(Succeed(attempt.finish))

    def _failed(self, attempt: _Attempt, side: _Side, error: DiptychError) -> list[Action]:
        side.open = False
        whole = not attempt.held and len(self._emitted) > attempt.first_index
        if side is attempt.prefill and attempt.decoding and whole and not attempt.doubt:
            return self._settle(attempt)
        if side is attempt.decode and isinstance(error, Cancelled) and attempt.prefill and attempt.prefill.open:
            attempt.doubt = error
            return []
        suspects = attempt.sides() if isinstance(error, TransferFailed) else (side,)
        self._avoid |= {suspect.worker_id for suspect in suspects}
        return self._next_attempt(error)

    def _next_attempt(self, error: DiptychError) -> list[Action]:
        if len(self._emitted) >= self.request.sampling.max_tokens:
            return self._end(Succeed(FinishReason.LENGTH))
        if isinstance(error, _FINAL):
            return self._fail(error)
        if self.attempts >= self._most_attempts:
            return self._fail(_last_word(error, self.attempts))
        return [*self._close(), self._place(error)]

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
