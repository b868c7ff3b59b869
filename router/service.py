"""What clients call, whichever face they come through: limits, text, and a `Run` per request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..core.clock import Clock
from ..core.config import LimitsSection
from ..core.errors import DiptychError, Overloaded, Unavailable
from ..core.generate import Chunk, Generate, Model
from ..core.metrics import Recorder
from ..core.request import Request, Tokens
from .admission import check_call, check_context, check_prompt, room
from .budget import RetryBudget
from .placement import Policy, capacity, unavailable
from .run import Run, Workers
from .text import Text


@dataclass(slots=True)
class Seat:
    """A request's place among the running ones. With a run it is the run that records how it ended."""

    has_run: bool = False


class Service:
    """Implements `rpc.inference.InferenceFace`; the HTTP face calls the same steps one by one."""

    def __init__(
        self, text: Text, workers: Workers, *, name: str, policy: Policy, limits: LimitsSection, recorder: Recorder, clock: Clock
    ) -> None:
        """`name`: the model's, for clients."""
        self.text = text
        self.name = name
        self.limits = limits
        self.clock = clock
        self._workers = workers
        self._policy = policy
        self._recorder = recorder
        self._budget = RetryBudget(clock.now())
        self._runs: set[Run] = set()
        self._seated = 0
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
            with self.run(seat, call, ids, accepted) as run:
                async for chunk in run:
                    yield chunk

    @contextmanager
    def seat(self) -> Iterator[Seat]:
        """Count a request as running; raises `Overloaded` when `limits.running` are, `Unavailable` when the router is stopping."""
        seat = Seat()
        try:
            with self._counted():
                yield seat
        except DiptychError as error:
            if not seat.has_run:
                self._recorder.inc("diptych_requests_total", outcome=error.code)
            raise

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._stopping:
            raise Unavailable("The router is shutting down.")
        if self._seated >= self.limits.running:
            raise Overloaded(f"{self._seated} requests are running, the limit of this router; try again later.")
        self._seated += 1
        self._empty.clear()
        self._recorder.set("diptych_requests_running", self._seated)
        try:
            yield
        finally:
            self._seated -= 1
            self._recorder.set("diptych_requests_running", self._seated)
            if not self._seated:
                self._empty.set()

    @contextmanager
    def run(self, seat: Seat, call: Generate, ids: tuple[int, ...], accepted: float) -> Iterator[Run]:
        """Place a checked call whose prompt is `ids`; closed at the end, which stops what is still under way.

        Raises `ContextExceeded` for what cannot fit, `Unavailable` when nobody could take it.
        """
        check_context(len(ids), call.sampling.max_tokens, self.text.card)
        seed = secrets.randbits(64) if call.sampling.seed is None else call.sampling.seed
        request = Request(call.request_id or new_request_id(), self.name, (Tokens(ids),), replace(call.sampling, seed=seed))
        run = Run(
            request, call.stop, accepted=accepted, retries=self.limits.retries, workers=self._workers, policy=self._policy,
            budget=self._budget, decoder=self.text.decoder(), recorder=self._recorder, clock=self.clock,
        )  # fmt: skip
        seat.has_run = True
        self._budget.accepted()
        self._recorder.inc("diptych_prompt_tokens_total", len(ids))
        self._runs.add(run)
        try:
            run.start(self.limits.request_s)
            yield run
        finally:
            self._runs.discard(run)
            run.close()

    def room(self, prompt_tokens: int) -> int:
        """Output tokens that fit behind a prompt, for calls that name no limit. Raises if the prompt itself does not fit."""
        check_prompt(prompt_tokens, self.text.card)
        return room(prompt_tokens, self.text.card, capacity(self._workers.snapshot()))

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


def new_request_id() -> str:
    """A fresh id for a request whose client gave none, 24 hex digits."""
    return secrets.token_hex(12)
