"""What clients call, whichever face they come through: limits, text, and a `Run` per request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..core.clock import Clock
from ..core.config import LimitsSection
from ..core.errors import DiptychError, InvalidRequest, Overloaded, Unavailable
from ..core.generate import Chunk, Generate, Model
from ..core.metrics import Recorder
from ..core.request import Request, Tokens, request_id_of
from ..core.workload import Window
from .admission import check_call, check_prompt, room
from .budget import RetryBudget
from .placement import Policy, capacity, unavailable
from .recording import Recording
from .run import Run, Workers
from .text import Text

HOLD_S = 30.0
"""How long a request waits for a worker to come back when nobody can take it. The supervisor starts a dead one again after 0.5 s (1 s the
second time), and a process is ready 2 to 5 s later, as it imports torch and maps its weights; on a host with too much to do, after 15 s."""


@dataclass(slots=True)
class Seat:
    """A request's place among the running ones, as wide as it has choices. With a run it is the run that records how it ended."""

    choices: int = 1
    has_run: bool = False


class Service:
    """Implements `rpc.inference.InferenceFace`; the HTTP face calls the same steps one by one."""

    def __init__(
        self,
        text: Text,
        workers: Workers,
        *,
        name: str,
        policy: Policy,
        limits: LimitsSection,
        recorder: Recorder,
        clock: Clock,
        hold_s: float = HOLD_S,
    ) -> None:
        """`name`: the model's, for clients."""
        self.text = text
        self.name = name
        self.limits = limits
        self.clock = clock
        self.recording = Recording(clock)
        self._workers = workers
        self._policy = policy
        self._recorder = recorder
        self._budget = RetryBudget(clock.now())
        self._hold_s = hold_s
        self._served = False
        self._capacity: int | None = None
        self._runs: dict[Run, None] = {}
        """In the order they came."""
        self._seated = 0
        self._choices = 0
        self._stopping = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def running(self) -> int:
        """Requests accepted and not yet ended."""
        return self._seated

    def models(self) -> tuple[Model, ...]:
        card = self.text.card
        return (Model(self.name, card.max_context, card.vocab_size, self.text.template is not None),)

    async def generate(self, call: Generate) -> AsyncGenerator[Chunk, None]:
        """See `InferenceFace`. Closing the generator cancels the request."""
        accepted = self.clock.now()
        with self.seat() as seat:
            check_call(call, self.text.card, self.name)
            ids = await self.text.encode(call.prompt) if isinstance(call.prompt, str) else call.prompt
            with self.run(seat, self.fitted(call, ids), ids, accepted) as run:
                async for chunk in run:
                    yield chunk

    @contextmanager
    def seat(self) -> Iterator[Seat]:
        """Count a request as running; raises `Overloaded` when `limits.running` are, `Unavailable` when the router is stopping."""
        seat = Seat()
        try:
            with self._counted(seat):
                yield seat
        except DiptychError as error:
            if not seat.has_run:
                self.refused(error)
            raise

    def refused(self, error: DiptychError) -> None:
        """Count a request that ended before it had a run."""
        self._recorder.inc("diptych_requests_total", outcome=error.code)
        self._recorder.inc("diptych_refusals_total", reason=error.code)

    @contextmanager
    def _counted(self, seat: Seat) -> Iterator[None]:
        if self._stopping:
            raise Unavailable("The router is shutting down.")
        self._check_room(seat.choices)
        self._seated += 1
        self._choices += seat.choices
        self._empty.clear()
        self._recorder.set("diptych_requests_running", self._seated)
        try:
            yield
        finally:
            self._seated -= 1
            self._choices -= seat.choices
            self._recorder.set("diptych_requests_running", self._seated)
            if not self._seated:
                self._empty.set()

    def _check_room(self, more: int) -> None:
        if self._choices + more > self.limits.running:
            raise Overloaded(f"{self._choices} requests are running (each choice counts), and {self.limits.running} may; try again later.")

    def _widen(self, seat: Seat, choices: int) -> None:
        """Make room for all choices of a request, which is counted once already."""
        if choices > self.limits.running:
            raise InvalidRequest(f"n is {choices}, and this router runs {self.limits.running} at once.", field="n")
        self._check_room(choices - seat.choices)
        self._choices += choices - seat.choices
        seat.choices = choices

    @contextmanager
    def run(self, seat: Seat, call: Generate, ids: tuple[int, ...], accepted: float) -> Iterator[Run]:
        """Place a checked call whose prompt is `ids`; closed at the end, which stops what is still under way.

        Raises `ContextExceeded` for what cannot fit, `Overloaded` when there is no room for its choices, `Unavailable` when nobody
        could take it.
        """
        self._widen(seat, call.sampling.n)
        seed = secrets.randbits(64) if call.sampling.seed is None else call.sampling.seed
        sampling = replace(call.sampling, seed=seed)
        request = Request(call.request_id or request_id_of(None), self.name, (Tokens(ids),), sampling, tenant=call.tenant)
        run = Run(
            request, call.stop, accepted=accepted, retries=self.limits.retries, workers=self._workers, policy=self._policy,
            budget=self._budget, decoder=self.text.decoder, recorder=self._recorder, clock=self.clock,
            hold_s=self._hold_s if self._served else 0.0,
        )  # fmt: skip
        seat.has_run = True
        self._budget.accepted()
        self._recorder.inc("vllm:prompt_tokens_total", len(ids))
        self._runs[run] = None
        try:
            run.start(self.limits.request_s)
            yield run
        finally:
            del self._runs[run]
            run.close()
            self.recording.ended(run.past())

    def fitted(self, call: Generate, ids: tuple[int, ...]) -> Generate:
        """The call on its token ids, its output no longer than what fits behind them. Raises if the prompt itself does not fit."""
        check_prompt(len(ids), self.text.card)
        fits = room(len(ids), self.text.card, capacity(self._workers.snapshot()) or self._capacity)
        sampling = call.sampling
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, fits), min_tokens=min(sampling.min_tokens, fits))
        return replace(call, prompt=ids, sampling=sampling)

    def fleet_changed(self) -> None:
        """To be called when a worker has come, gone or changed its state: who waits for one is placed, the oldest request first."""
        snapshot = self._workers.snapshot()
        self._served = self._served or unavailable(snapshot, self._policy) is None
        # While the only decode worker is started again the fleet has none, and yet a request is not to ask for more than it will hold.
        self._capacity = capacity(snapshot) or self._capacity
        for run in list(self._runs):
            run.fleet_changed()

    def window(self, seconds: float) -> Window:
        """The load of the last `seconds`, with what is under way."""
        return self.recording.window(seconds, (run.past() for run in self._runs))

    def oldest(self) -> float | None:
        """When the first of the requests came that have not ended, on the router's clock; None: there are none."""
        return min((run.past().accepted for run in self._runs), default=None)

    def unavailable(self) -> str | None:
        """Why no request could be served now, or None if one could."""
        return "The router is shutting down." if self._stopping else unavailable(self._workers.snapshot(), self._policy)

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, let what runs finish for up to `grace_s` seconds, then end it with an error."""
        self._stopping = True
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            for run in list(self._runs):
                run.give_up(Unavailable("The router is shutting down."))
