"""One request under way: the shell around its machine. Performs actions, turns tokens into text, takes the times."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, Self

from ..core.clock import Clock
from ..core.commands import Command, Event, FirstTokens, NewTokens
from ..core.errors import Cancelled, DeadlineExceeded, DiptychError, Internal, Overloaded, Unavailable
from ..core.generate import Chunk, Finish, Timing, Usage
from ..core.metrics import Recorder
from ..core.notes import FIELDS, note
from ..core.recordings import Doing
from ..core.request import FinishReason, Request, Token, new_attempt_id
from ..core.spans import span
from .actions import Action, Emit, End, Fail, Move, Place, Send, Succeed
from .budget import RetryBudget
from .link import Listener
from .machine import RequestMachine
from .placement import Across, Path, Placement, Policy, Snapshot, place
from .recording import Past
from .sharing import elsewhere
from .text import Detokeniser
from .times import Times
from .writing import Writing

log = logging.getLogger(__name__)


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
        decoder: Callable[[], Detokeniser],
        recorder: Recorder,
        clock: Clock,
        hold_s: float,
    ) -> None:
        """`accepted`: when the request came, on `clock`. `decoder` makes a fresh detokeniser. `hold_s`: how long an attempt that nobody
        can take now waits for somebody to come."""
        self.request_id = request.request_id
        self._machine = RequestMachine(request, retries=retries)
        self._workers = workers
        self._policy = policy
        self._budget = budget
        self._recorder = recorder
        self._clock = clock
        sampling = request.sampling
        self._writings = [Writing(choice, decoder(), stop, min_tokens=sampling.min_tokens) for choice in range(sampling.n)]
        self._times = Times(accepted, sampling.n, recorder)
        self._todo: deque[Action] = deque()
        self._performing = False
        self._news: dict[int, None] = {}
        """Choices that have something nobody has taken, those that have waited longest first."""
        self._reasons: set[FinishReason] = set()
        self._end: Finish | DiptychError | None = None
        self._delivered = False
        self._wake = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self._hold_s = hold_s
        self._held: Place | None = None
        """What nobody can take now."""
        self._hold_over: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Place and send; after `seconds` the request is ended with an error. What nobody could ever take fails here."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)
        self._perform(self._machine.start())
        if isinstance(self._end, DiptychError):
            raise self._end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """What has come of one choice since its last chunk: a client that reads slowly gets fewer and larger ones."""
        if self._delivered:
            raise StopAsyncIteration
        while not self._news and self._end is None:
            self._wake.clear()
            await self._wake.wait()
        choice = next(iter(self._news), None)
        if choice is None and isinstance(self._end, DiptychError):
            self._delivered = True
            raise self._end
        chunk = Chunk(self.request_id) if choice is None else self._take(choice)
        if self._news or not isinstance(self._end, Finish):
            return chunk
        self._delivered = True
        return replace(chunk, finish=self._end)

    def _take(self, choice: int) -> Chunk:
        del self._news[choice]
        return self._writings[choice].take(self.request_id)

    def close(self) -> None:
        """Nobody reads any more: whatever still works for this request is stopped."""
        self.give_up(Cancelled("The client went away."))

    def give_up(self, error: DiptychError) -> None:
        """End with `error`, if not yet ended."""
        self._perform(self._machine.give_up(error))

    def event(self, worker_id: str, event: Event) -> None:
        """See `link.Listener`."""
        try:
            if isinstance(event, FirstTokens | NewTokens) and event.queued is not None:
                self._recorder.observe("vllm:request_queue_time_seconds", event.queued)
            self._perform(self._machine.event(worker_id, event))
        except Exception as error:  # noqa: BLE001  a defect with one request must not end the stream that carries all the others
            self._defect(error)

    def lost(self, worker_id: str) -> None:
        """See `link.Listener`."""
        try:
            self._perform(self._machine.lost(worker_id))
        except Exception as error:  # noqa: BLE001  as above
            self._defect(error)

    def fleet_changed(self) -> None:
        """A worker came, went or changed its state."""
        try:
            self._perform(self._try(self._held) if self._held else self._share())
        except Exception as error:  # noqa: BLE001  as above
            self._defect(error)

    def _defect(self, error: Exception) -> None:
        log.error("a defect in the router", exc_info=error, extra={FIELDS: {"request": self.request_id}})
        # What workers are to be told they still are; nothing else is tried again.
        self._todo = deque(action for action in self._todo if isinstance(action, Send))
        told = Internal("An internal error ended the request; the router's log has it.")
        self.give_up(told)
        if self._end is None:
            self._ended(told)

    def _expire(self, seconds: float) -> None:
        self.give_up(DeadlineExceeded(f"The request had not ended after {seconds:g} s, the router's limit."))

    def _perform(self, actions: Iterable[Action]) -> None:
        """In order; what follows from an action comes behind what is asked for already."""
        self._todo.extend(actions)
        if self._performing:
            return
        self._performing = True
        try:
            while self._todo:
                self._act(self._todo.popleft())
        finally:
            self._performing = False

    def _act(self, action: Action) -> None:
        match action:
            case Send(worker_id, command):
                with span(Doing.COMMAND, who=(self.request_id, command.attempt_id)):
                    self._workers.send(worker_id, command, self)
            case Emit(tokens):
                with span(Doing.EMIT, who=(self.request_id,)):
                    self._emit(self._writings[tokens[0].choice], tokens)
            case End(choice, reason):
                self._reasons.add(self._writings[choice].end(reason))
                self._tell(choice)
            case Place():
                self._perform([] if self._machine.ended else self._place(action))
            case Move():
                self._perform(self._move(action))
            case Succeed():
                # One that was cut at its limit is what a request with several choices is counted by.
                self._ended(max(self._reasons, key=lambda reason: reason is FinishReason.LENGTH))
            case Fail(error):
                self._ended(error)

    def _place(self, wanted: Place) -> list[Action]:
        now = self._clock.now()
        if wanted.cause and not self._budget.take(now):
            return self._machine.unplaceable(Overloaded(f"{wanted.cause.message} Too many requests are being retried to try again."))
        return self._try(wanted)

    def _try(self, wanted: Place) -> list[Action]:
        try:
            placement = place(self._workers.snapshot(), wanted.demand, self._policy)
        except Unavailable as error:
            return self._hold(wanted, error)
        except DiptychError as error:
            return self._machine.unplaceable(error)
        self._let_go()
        if wanted.cause:
            self._recorder.inc("diptych_retries_total", code=wanted.cause.code)
            note(log, "another attempt", request=self.request_id, attempt=self._machine.attempts + 1, after=wanted.cause.message)
        elif self._machine.attempts:
            self._recorder.inc("diptych_moves_total")
        self._record_transfer()
        return self._placed(placement, self._machine.placed(placement, new_attempt_id()))

    def _move(self, wanted: Move) -> list[Action]:
        """If another worker can take it now."""
        try:
            placement = place(self._workers.snapshot(), wanted.demand, self._policy)
        except DiptychError:
            return []
        actions = self._machine.moved(placement, new_attempt_id(), wanted.attempt_id)
        if not actions:
            return []
        self._recorder.inc("diptych_moves_total")
        note(log, "a request moves", request=self.request_id, attempt=self._machine.attempts)
        return self._placed(placement, actions)

    def _share(self) -> list[Action]:
        """Go to a decode worker that has come, if that is better than to wait for the memory of another."""
        waits = self._machine.waits()
        avoid = elsewhere(self._workers.snapshot(), *waits) if waits else None
        return [] if avoid is None else self._machine.share(avoid)

    def _placed(self, placement: Placement, actions: list[Action]) -> list[Action]:
        """Record where an attempt is opened by these actions."""
        self._recorder.inc("diptych_attempts_total", path=placement.path.value)
        if placement.across:
            self._tell_across(placement, placement.across)
        return actions

    def _tell_across(self, placement: Placement, why: Across) -> None:
        prefill, decode = placement.prefill, placement.decode
        self._recorder.inc("diptych_attempts_across_total", why=why.value)
        note(
            log, "KV leaves its pair", request=self.request_id, prefill=prefill and prefill.worker_id, decode=decode and decode.worker_id,
            partner=prefill and prefill.partner, why=why.value,
        )  # fmt: skip

    def _hold(self, wanted: Place, error: Unavailable) -> list[Action]:
        """Wait for the fleet to change; not longer than `hold_s` in all."""
        if not self._hold_s:
            return self._machine.unplaceable(error)
        if self._held is None:
            note(log, "a request waits", request=self.request_id, reason=error.message)
            self._recorder.inc("diptych_requests_held_total")
            self._held = wanted
            self._hold_over = asyncio.get_running_loop().call_later(self._hold_s, self._waited_in_vain, error)
        return []

    def _waited_in_vain(self, error: Unavailable) -> None:
        self._perform(self._machine.unplaceable(Unavailable(f"{error.message} It was waited for {self._hold_s:g} s.")))

    def _let_go(self) -> None:
        self._held = None
        if self._hold_over:
            self._hold_over.cancel()

    def _emit(self, writing: Writing, tokens: tuple[Token, ...]) -> None:
        """Take a choice's new tokens; those behind a stop string are dropped, and it is not written on."""
        if writing.stopped:
            return
        placement = self._machine.placement
        handed_over = placement is not None and placement.path is Path.DISAGGREGATED and self._machine.attempts == 1
        now = self._clock.now()
        for token in tokens:
            self._times.token(writing.choice, now, handed_over)
            writing.push(token)
            if writing.stopped:
                self._perform(self._machine.stop(writing.choice))
                break
        self._tell(writing.choice)

    def _tell(self, choice: int) -> None:
        """This choice has something for the client."""
        self._news.setdefault(choice)
        self._wake.set()

    def _ended(self, outcome: FinishReason | DiptychError) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._let_go()
        if isinstance(outcome, FinishReason):
            usage = Usage(len(self._machine.request.prompt_ids), self._times.tokens, self._machine.cached_tokens)
            self._end = Finish(usage, self._timing())
        else:
            self._end = outcome
        self._wake.set()
        self._record(outcome)

    def past(self) -> Past:
        """What is recorded of it, when it has ended or before."""
        machine, times = self._machine, self._times
        prompt_tokens = len(machine.request.prompt_ids)
        return Past(times.accepted, prompt_tokens, machine.cached_tokens, times.tokens, times.ttft, times.tpot)

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
            self._recorder.observe("vllm:request_time_per_output_token_seconds", timing.tpot)
        seconds = self._clock.now() - self._times.accepted
        if isinstance(outcome, FinishReason):
            self._recorder.inc("vllm:request_success_total", finished_reason=name)
            self._recorder.observe("vllm:e2e_request_latency_seconds", seconds)
        self._record_transfer()
        line: dict[str, Any] = {
            "request": self.request_id,
            "outcome": name,
            "prompt_tokens": len(self._machine.request.prompt_ids),
            "cached_tokens": self._machine.cached_tokens,
            "choices": len(self._writings),
            "output_tokens": self._times.tokens,
            "seconds": round(seconds, 4),
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
        note(log, "request ended", **line)

    def _record_transfer(self) -> None:
        """The latest attempt's; called when the attempt is over."""
        if moved := self._machine.handed_over:
            self._recorder.inc("diptych_kv_transfer_bytes_total", moved.kv_bytes, transport=moved.transport)
            self._recorder.observe("diptych_kv_transfer_seconds", moved.seconds, transport=moved.transport)
            self._recorder.observe("diptych_kv_transfer_exposed_seconds", moved.exposed, transport=moved.transport)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 5)
