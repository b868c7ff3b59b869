"""Faces that echo, and a server around them on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from diptych.core.commands import NewTokens, StepEvents
from diptych.core.errors import DiptychError
from diptych.core.fleet import Fleet, WorkerReport, WorkerState
from diptych.core.generate import Chunk, Finish, Generate, Model, Timing, Usage
from diptych.core.request import FinishReason, Token
from diptych.core.workload import Window
from diptych.rpc.lane import Lane
from diptych.rpc.server import Server, serve
from diptych.rpc.worker import RouterStream

Serving = Callable[..., AbstractAsyncContextManager[Server]]


class EchoWorker:
    """Answers every command with its attempt id and every lane message with itself; remembers how its streams ended."""

    def __init__(self) -> None:
        self.ended: asyncio.Queue[DiptychError | None] = asyncio.Queue()
        self.watchers = 0
        self.echo = True

    async def attached(self, stream: RouterStream) -> None:
        try:
            async for command in stream:
                stream.send(StepEvents((NewTokens(command.attempt_id, ()),)))
        except DiptychError as error:
            self.ended.put_nowait(error)
            raise
        self.ended.put_nowait(None)

    async def lane(self, lane: Lane) -> None:
        try:
            async for message in lane:
                if self.echo:
                    lane.send(message)
        except DiptychError as error:
            self.ended.put_nowait(error)
            raise
        self.ended.put_nowait(None)

    async def reports(self) -> AsyncGenerator[WorkerReport, None]:
        self.watchers += 1
        try:
            for waiting in range(10**6):
                yield WorkerReport("w", 7, WorkerState.READY, waiting, 0, 0, 1, 1, 0)
                await asyncio.sleep(0.001)
        finally:
            self.watchers -= 1
            self.ended.put_nowait(None)

    async def drain(self, timeout_s: float) -> int:
        return int(timeout_s * 10)


class FixedRouter:
    def __init__(self) -> None:
        self.fleet = Fleet(0)

    def publish(self, fleet: Fleet) -> int:
        if fleet.version > self.fleet.version:
            self.fleet = fleet
        return self.fleet.version

    def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        return self.fleet, (WorkerReport("w", 7, WorkerState.DRAINING, 1, 2, 3, 4, 5, 6, (("n", 1.5),)),)

    def window(self, seconds: float) -> Window:
        return Window(seconds, ())


class Parrot:
    """Says the prompt's words one by one, a chunk each; after `hold_after` of them it waits; remembers its calls and how they ended."""

    def __init__(self) -> None:
        self.calls: list[Generate] = []
        self.closed: asyncio.Queue[int] = asyncio.Queue()
        self.hold_after: int | None = None
        self.error: Exception | None = None
        self.refusals: list[DiptychError] = []
        self.silent_end = False

    async def generate(self, call: Generate) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        said = 0
        try:
            call.sampling.validate(vocab_size=1000)
            words = call.prompt.split() if isinstance(call.prompt, str) else [str(token) for token in call.prompt]
            for index, text in enumerate(words):
                if index == self.hold_after:
                    await asyncio.get_running_loop().create_future()
                yield Chunk("r1", text=text, tokens=(Token(index, index + 10, logprob=-0.1, top=((index + 10, -0.1),)),))
                said += 1
            if self.error is not None:
                raise self.error
            if not self.silent_end:
                finish = Finish(Usage(len(words), said), Timing(ttft=0.25, transport="shm"))
                yield Chunk("r1", finish=finish, reason=FinishReason.STOP)
        finally:
            self.closed.put_nowait(said)

    def models(self) -> tuple[Model, ...]:
        return (Model("parrot", 4096, 1000, False),)

    def refused(self, error: DiptychError) -> None:
        self.refusals.append(error)


@pytest.fixture
def echo_worker() -> Callable[[], EchoWorker]:
    """Call it inside the event loop that will use the worker."""
    return EchoWorker


@pytest.fixture
def fixed_router() -> FixedRouter:
    return FixedRouter()


@pytest.fixture
def parrot() -> Callable[[], Parrot]:
    return Parrot


@pytest.fixture
def serving() -> Serving:
    @asynccontextmanager
    async def run(address: str = "127.0.0.1:0", grace_s: float = 0.0, **options: object) -> AsyncIterator[Server]:
        server = await serve(address, **options)  # type: ignore[arg-type]
        try:
            yield server
        finally:
            await server.stop(grace_s)

    return run


@pytest.fixture
def unused_listener() -> Iterator[str]:
    """The address of a socket that accepts connections (the kernel does) and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield "{}:{}".format(*listener.getsockname())
