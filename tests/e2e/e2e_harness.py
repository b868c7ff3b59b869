"""Workers as real processes, and a stand-in for the router that speaks to them over rpc's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from diptych.cluster.process.spec import RankSpec
from diptych.core.commands import (
    ChoiceFinished,
    Command,
    Decode,
    Event,
    Failed,
    Finished,
    FirstTokens,
    HandedOver,
    NewTokens,
    Prefill,
    Stop,
)
from diptych.core.errors import DiptychError
from diptych.core.fleet import Phase, WorkerReport
from diptych.core.request import FinishReason, Request, Token, Tokens, new_attempt_id
from diptych.core.sampling import SamplingParams
from diptych.rpc.worker import WorkerClient, WorkerStream
from rank_process import Rank

ANSWER_S = 60.0
IDLE_S = 60.0
TERMINAL = (HandedOver, Finished, Failed)


@contextmanager
def ranks(directory: Path, *specs: RankSpec) -> Iterator[list[Rank]]:
    """Workers, each of as many ranks as its spec says, started side by side and ready; killed at the end. The spec's `rank` is 0."""
    started = [Rank.start(spec, directory) for spec in specs]
    try:
        for rank in started:  # those that follow start, and import torch, beside those of the other workers
            rank.bring_followers()
        for rank in started:
            rank.wait_for("ready")
        yield started
    finally:
        for rank in started:
            rank.kill()


@dataclass
class Family:
    """Ranks of one tiny model. `prefills` differ in their chunks; `decode` prefills in smaller ones."""

    prefills: list[Rank]
    decode: Rank


def rank_spec(model: Path, phase: Phase, worker_id: str, **changes: object) -> RankSpec:
    """A small rank that checks its books at every idle moment."""
    values: dict[str, object] = {"kv_tokens": 1024, "chunk_tokens": 32, "max_running": 8, "log_level": "debug", "check": True}
    return RankSpec.model_validate({"worker_id": worker_id, "phase": phase, "model_dir": model, **values, **changes})


def request(prompt: Iterable[int], *, generated: tuple[int, ...] = (), **sampling: object) -> Request:
    """Greedy, 16 tokens, end tokens ignored, unless told otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
    return Request(request_id="r", model="", prompt=(Tokens(tuple(prompt)),), sampling=params, generated=(generated,) if generated else ())


class Stream:
    """A stream to one worker, its events sorted by attempt."""

    def __init__(self, stream: WorkerStream) -> None:
        self._stream = stream
        self._queues: dict[str, asyncio.Queue[Event | DiptychError]] = {}
        self._broken: DiptychError | None = None
        self.messages = 0
        self._reader = asyncio.create_task(self._read())

    def queue(self, attempt_id: str) -> asyncio.Queue[Event | DiptychError]:
        queue = self._queues.setdefault(attempt_id, asyncio.Queue())
        if self._broken is not None:
            queue.put_nowait(self._broken)
        return queue

    def send(self, command: Command) -> None:
        self._stream.send(command)

    async def _read(self) -> None:
        try:
            async for step in self._stream:
                self.messages += 1
                for event in step.events:
                    self._queues.setdefault(event.attempt_id, asyncio.Queue()).put_nowait(event)
        except DiptychError as error:
            self._broken = error
            for queue in self._queues.values():
                queue.put_nowait(error)

    async def next(self, attempt_id: str) -> Event:
        """The attempt's next event; raises what broke the stream."""
        async with asyncio.timeout(ANSWER_S):
            event = await self.queue(attempt_id).get()
        if isinstance(event, DiptychError):
            raise event
        return event

    async def until_terminal(self, attempt_id: str) -> list[Event]:
        """All events of an attempt up to its last one; asserts that nothing is said twice or out of order."""
        events: list[Event] = []
        while not events or not isinstance(events[-1], TERMINAL):
            events.append(await self.next(attempt_id))
        return events

    async def close(self) -> None:
        self._stream.close()
        await self._reader


@dataclass
class Written:
    """One choice."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    finish: FinishReason | None = None


@dataclass
class Answer:
    """One request's outcome, its live choices by number. `error`: what either worker failed with."""

    attempt_id: str
    choices: dict[int, Written]
    first: FirstTokens | None = None
    handed_over: HandedOver | None = None
    finished: Finished | None = None
    error: DiptychError | None = None

    @classmethod
    def to(cls, asked: Request, attempt_id: str | None) -> Answer:
        return cls(attempt_id or new_attempt_id(), {choice: Written() for choice in asked.live})

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of choice 0, like the next."""
        return self.choices[0].tokens

    @property
    def logprobs(self) -> tuple[float | None, ...]:
        return self.choices[0].logprobs

    @property
    def finish(self) -> FinishReason | None:
        return self.choices[0].finish

    def take(self, asked: Request, token: Token) -> None:
        """Tokens must come in order of their index, each once."""
        written = self.choices[token.choice]
        assert token.index == len(asked.generated_by(token.choice)) + len(written.tokens)
        assert written.finish is None
        written.tokens += (token.id,)
        written.logprobs += (token.logprob,)


@dataclass
class Workers:
    """A router's place: streams to one prefill and one decode worker (either may be absent)."""

    prefill: Stream | None
    decode: Stream | None
    decode_address: str | None
    clients: dict[str, WorkerClient]

    async def local(self, asked: Request, attempt_id: str | None = None) -> Answer:
        """The decode worker reads the prompt itself."""
        answer = Answer.to(asked, attempt_id)
        assert self.decode is not None
        self.decode.send(Decode(answer.attempt_id, asked, local_prefill=True))
        _read_decode(answer, asked, await self.decode.until_terminal(answer.attempt_id))
        return answer

    async def disaggregated(self, asked: Request, attempt_id: str | None = None) -> Answer:
        answer = Answer.to(asked, attempt_id)
        assert self.prefill is not None
        assert self.decode is not None
        self.decode.send(Decode(answer.attempt_id, asked))
        self.prefill.send(Prefill(answer.attempt_id, asked, self.decode_address))
        prefilled, decoded = await asyncio.gather(self._prefilled(answer.attempt_id), self._decoded(answer.attempt_id))
        self._read_prefill(answer, asked, prefilled)
        if any(written.finish is None for written in answer.choices.values()):
            _read_decode(answer, asked, decoded)
        return answer

    async def prefill_only(self, asked: Request, attempt_id: str | None = None) -> Answer:
        """A request of one token, for P alone."""
        answer = Answer.to(asked, attempt_id)
        assert self.prefill is not None
        self.prefill.send(Prefill(answer.attempt_id, asked, None))
        self._read_prefill(answer, asked, await self.prefill.until_terminal(answer.attempt_id))
        return answer

    async def _prefilled(self, attempt_id: str) -> list[Event]:
        """Follow P; an attempt that ends there without a hand-over is stopped at D."""
        assert self.prefill is not None
        assert self.decode is not None
        events = await self.prefill.until_terminal(attempt_id)
        if not isinstance(events[-1], HandedOver):
            self.decode.send(Stop(attempt_id))
        return events

    async def _decoded(self, attempt_id: str) -> list[Event]:
        assert self.prefill is not None
        assert self.decode is not None
        events = await self.decode.until_terminal(attempt_id)
        if isinstance(events[-1], Failed):
            self.prefill.send(Stop(attempt_id))
        return events

    @staticmethod
    def _read_prefill(answer: Answer, asked: Request, events: list[Event]) -> None:
        for event in events:
            match event:
                case FirstTokens():
                    answer.first = event
                    for token, finish in zip(event.tokens, event.finishes, strict=True):
                        if finish is not FinishReason.STOP:
                            answer.take(asked, token)
                        answer.choices[token.choice].finish = finish
                case HandedOver():
                    answer.handed_over = event
                case Failed():
                    answer.error = event.error

    async def idle(self, *, timeout_s: float = IDLE_S) -> None:
        """Wait until both workers report that nothing is held and their books are right."""
        for client in self.clients.values():
            await wait_idle(client, timeout_s=timeout_s)


def _read_decode(answer: Answer, asked: Request, events: list[Event]) -> None:
    for event in events:
        match event:
            case NewTokens():
                for token in event.tokens:
                    answer.take(asked, token)
            case ChoiceFinished():
                assert answer.choices[event.choice].finish is None, "a choice ends once"
                answer.choices[event.choice].finish = event.finish
            case Finished():
                answer.finished = event
            case Failed():
                answer.error = event.error


async def wait_idle(client: WorkerClient, *, timeout_s: float = IDLE_S) -> WorkerReport:
    """The first report of a worker that holds nothing and has found its books right since."""
    report = None
    try:
        async with asyncio.timeout(timeout_s):
            async for report in client.watch():
                held = (report.waiting, report.running, report.leases, report.blocks_total - report.blocks_free)
                if not any(held) and dict(report.counters).get("diptych_worker_idle_checks_total"):
                    return report
    except TimeoutError:
        raise AssertionError(f"not idle after {timeout_s} s: {report}") from None
    raise AssertionError("the watch ended")


@asynccontextmanager
async def attached(prefill: Rank | None, decode: Rank | None) -> AsyncIterator[Workers]:
    """Streams to the ranks, closed at the end."""
    clients = {rank.spec.worker_id: WorkerClient(rank.address) for rank in (prefill, decode) if rank is not None}
    streams = {worker_id: Stream(client.attach()) for worker_id, client in clients.items()}
    try:
        yield Workers(
            prefill=streams[prefill.spec.worker_id] if prefill else None,
            decode=streams[decode.spec.worker_id] if decode else None,
            decode_address=decode.address if decode else None,
            clients=clients,
        )
    finally:
        for stream in streams.values():
            await stream.close()
        for client in clients.values():
            await client.close()
