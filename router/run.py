"""One request under way: the shell around its machine. Performs actions, turns tokens into text, takes the times."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Protocol, Self

from ..core.clock import Clock
from ..core.commands import Command, Event
from ..core.errors import Cancelled, DeadlineExceeded, DiptychError, Internal, Overloaded
from ..core.generate import Chunk, Finish, Timing, Usage
from ..core.metrics import Recorder
from ..core.request import FinishReason, Request, Token, new_attempt_id
from .budget import RetryBudget
from .link import Listener
from .machine import Action, Emit, Fail, Place, RequestMachine, Send, Succeed
from .placement import Path, Policy, Snapshot, place
from .text import Detokeniser, StopStrings

log = logging.getLogger("diptych.router.requests")


class Workers(Protocol):
    """What a run needs of the fleet."""

    def snapshot(self) -> Snapshot: ...

    def send(self, worker_id: str, command: Command, listener: Listener) -> None: ...


class Run:
    """Iterate for the answer's chunks, the last with `finish`; a failed request raises. `close` in any case, at the end."""

    def __init__(
        self,
        request: Request,
        stop: tuple[str, ...],
        *,
        accepted: float,
        retries: int,
        workers: Workers,
        policy: Policy,
        budget: RetryBudget,
        decoder: Detokeniser,
        recorder: Recorder,
        clock: Clock,
    ) -> None:
        """`accepted`: when the request came, on `clock`."""
        self.request_id = request.request_id
        self._machine = RequestMachine(request, retries=retries)
        self._workers = workers
        self._policy = policy
        self._budget = budget
        self._recorder = recorder
        self._clock = clock
        self._decoder = decoder
        self._stop = StopStrings(stop)
        self._times = _Times(accepted, recorder)
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._end: Finish | DiptychError | None = None
        self._stopped = False
        """A stop string is complete: text behind it is not sent."""
        self._delivered = False
        self._wake = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Place and send; after `seconds` the request is ended with an error. What nobody can take fails here."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)
        self._perform(self._machine.start())
        if isinstance(self._end, DiptychError):
            raise self._end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """What has come since the last chunk: a client that reads slowly gets fewer and larger ones."""
        if self._delivered:
            raise StopAsyncIteration
        while not self._tokens and not self._text and self._end is None:
            self._wake.clear()
            await self._wake.wait()
        if isinstance(self._end, DiptychError) and not self._tokens and not self._text:
            self._delivered = True
            raise self._end
        finish = self._end if isinstance(self._end, Finish) else None
        self._delivered = finish is not None
        chunk = Chunk(self.request_id, "".join(self._text), tuple(self._tokens), finish)
        self._text, self._tokens = [], []
        return chunk

    def close(self) -> None:
        """Nobody reads any more: whatever still works for this request is stopped."""
        self.give_up(Cancelled("The client went away."))

    def give_up(self, error: DiptychError) -> None:
        """End with `error`, if not yet ended."""
        self._perform(self._machine.give_up(error))

    def event(self, worker_id: str, event: Event) -> None:
        """See `link.Listener`."""
        try:
            self._perform(self._machine.event(worker_id, event))
        except Exception as error:  # noqa: BLE001  a defect with one request must not end the stream that carries all the others
            self._defect(error)

    def lost(self, worker_id: str) -> None:
        """See `link.Listener`."""
        try:
            self._perform(self._machine.lost(worker_id))
        except Exception as error:  # noqa: BLE001  as above
            self._defect(error)

    def _defect(self, error: Exception) -> None:
        log.error("request %s: a defect in the router", self.request_id, exc_info=error)
        self.give_up(Internal("An internal error ended the request; the router's log has it."))

    def _expire(self, seconds: float) -> None:
        self.give_up(DeadlineExceeded(f"The request had not ended after {seconds:g} s, the router's limit."))

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send(worker_id, command):
                    self._workers.send(worker_id, command, self)
                case Emit(tokens):
                    if self._emit(tokens):
                        self._perform(self._machine.stop())
                case Place():
                    self._perform([] if self._machine.ended else self._place(action))
                case Succeed(reason):
                    self._ended(reason)
                case Fail(error):
                    self._ended(error)

    def _place(self, wanted: Place) -> list[Action]:
        now = self._clock.now()
        if wanted.cause and not self._budget.take(now):
            return self._machine.unplaceable(Overloaded(f"{wanted.cause.message} Too many requests are being retried to try again."))
        try:
            placement = place(self._workers.snapshot(), wanted.demand, self._policy)
        except DiptychError as error:
            return self._machine.unplaceable(error)
        if wanted.cause:
            self._recorder.inc("diptych_retries_total", code=wanted.cause.code)
            log.info("request %s: attempt %d after: %s", self.request_id, self._machine.attempts + 1, wanted.cause.message)
        self._record_transfer()
        self._recorder.inc("diptych_attempts_total", path=placement.path.value)
        return self._machine.placed(placement, new_attempt_id())

    def _emit(self, tokens: tuple[Token, ...]) -> bool:
        """Take new tokens and their text; whether a stop string is complete (tokens behind it are dropped)."""
        placement = self._machine.placement
        handed_over = placement is not None and placement.path is Path.DISAGGREGATED and self._machine.attempts == 1
        now = self._clock.now()
        self._wake.set()
        for token in tokens:
            self._times.token(now, handed_over)
            self._tokens.append(token)
            text, stopped = self._decoder.push(token.id), False
            if token.index >= self._machine.request.sampling.min_tokens:
                text, stopped = self._stop.push(text)
            if text:
                self._text.append(text)
            if stopped:
                self._stopped = True
                return True
        return False

    def _ended(self, outcome: FinishReason | DiptychError) -> None:
        if self._deadline:
            self._deadline.cancel()
        if isinstance(outcome, FinishReason):
            outcome = FinishReason.STOP if self._stopped else outcome
            if not self._stopped and (rest := self._rest()):
                self._text.append(rest)
            usage = Usage(len(self._machine.request.prompt_ids), self._times.tokens, self._machine.cached_tokens)
            self._end = Finish(outcome, usage, self._timing())
        else:
            self._end = outcome
        self._wake.set()
        self._record(outcome)

    def _rest(self) -> str:
        """What was held back, now that nothing follows."""
        text, stopped = self._stop.push(self._decoder.flush())
        return text if stopped else text + self._stop.flush()

    def _timing(self) -> Timing:
        placement, moved = self._machine.placement, self._machine.handed_over
        return Timing(
            ttft=self._times.ttft or 0.0,
            tpot=self._times.tpot,
            handover_gap=self._times.handover_gap,
            kv_bytes=moved.kv_bytes if moved else 0,
            transfer_seconds=moved.seconds if moved else 0.0,
            transport=moved.transport if moved else "",
            prefill_worker=placement.prefill.worker_id if placement and placement.prefill else "",
            decode_worker=placement.decode.worker_id if placement and placement.decode else "",
            attempts=self._machine.attempts,
        )

    def _record(self, outcome: FinishReason | DiptychError) -> None:
        name = outcome.value if isinstance(outcome, FinishReason) else outcome.code
        self._recorder.inc("diptych_requests_total", outcome=name)
        timing = self._timing()
        if timing.tpot is not None:
            self._recorder.observe("diptych_tpot_seconds", timing.tpot)
        self._record_transfer()
        line: dict[str, object] = {
            "request": self.request_id,
            "outcome": name,
            "prompt_tokens": len(self._machine.request.prompt_ids),
            "cached_tokens": self._machine.cached_tokens,
            "output_tokens": self._times.tokens,
            "seconds": round(self._clock.now() - self._times.accepted, 4),
            "ttft": _rounded(self._times.ttft),
            "tpot": _rounded(timing.tpot),
            "handover_gap": _rounded(timing.handover_gap),
            "prefill": timing.prefill_worker,
            "decode": timing.decode_worker,
            "kv_bytes": timing.kv_bytes,
            "transport": timing.transport,
            "attempts": timing.attempts,
        }
        if isinstance(outcome, DiptychError) and not isinstance(outcome, Cancelled):
            line["error"] = outcome.message
        log.info("%s", json.dumps(line))

    def _record_transfer(self) -> None:
        """The latest attempt's; called when the attempt is over."""
        if moved := self._machine.handed_over:
            self._recorder.inc("diptych_kv_transfer_bytes_total", moved.kv_bytes, transport=moved.transport)
            self._recorder.observe("diptych_kv_transfer_seconds", moved.seconds, transport=moved.transport)


class _Times:
    """When tokens went out, and what follows from it. Seconds on the router's clock."""

    def __init__(self, accepted: float, recorder: Recorder) -> None:
        self.accepted = accepted
        self.tokens = 0
        self.ttft: float | None = None
        self.handover_gap: float | None = None
        self._last = accepted
        self._recorder = recorder

    @property
    def tpot(self) -> float | None:
        if self.ttft is None or self.tokens < 2:
            return None
        return (self._last - self.accepted - self.ttft) / (self.tokens - 1)

    def token(self, now: float, handed_over: bool) -> None:
        """One more token. The gap between tokens 1 and 2 of a disaggregated request is the hand-over's, reported apart."""
        gap = now - self._last
        self.tokens += 1
        self._last = now
        self._recorder.inc("diptych_output_tokens_total")
        if self.tokens == 1:
            self.ttft = gap
            self._recorder.observe("diptych_ttft_seconds", gap)
        elif self.tokens == 2 and handed_over:
            self.handover_gap = gap
            self._recorder.observe("diptych_handover_gap_seconds", gap)
        elif self.tokens > 2:
            self._recorder.observe("diptych_itl_seconds", gap)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 5)
