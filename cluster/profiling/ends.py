"""Two workers' ends of the hinge in two processes: pools, `Source`, `Destination` and the lane as in production, and no engine.

This process has the source and asks; the other has the destination and answers over a pipe. Both ends use their pool's blocks in an order
of their own, as pools do that have been in use for a while, so no two blocks of a transfer are neighbours at both ends.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from random import Random
from typing import Any, TypeVar

import torch

from ...core.clock import MonotonicClock
from ...core.errors import DiptychError, Unavailable
from ...core.fleet import WorkerReport
from ...core.layout import Layout
from ...core.request import Token
from ...core.transfer import GroupGrant, Transport
from ...kv_transfer.destination import Destination
from ...kv_transfer.pool import CPU, Pool
from ...kv_transfer.source import Source
from ...rpc.lane import Lane
from ...rpc.server import serve
from ...rpc.worker import RouterStream
from ..programs.rank import see_gpu

LEASE_S = 60.0
HOST = "127.0.0.1"
TOKENS = (Token(0, 42),)


def device_for(transport: Transport) -> torch.device:
    """Where a pool is: on the first GPU that its process sees."""
    return torch.device("cuda", 0) if transport.on_gpu else CPU


def blocks_of(layout: Layout, seed: int, first: int, count: int) -> tuple[int, ...]:
    """The transfer's blocks at the end that uses its pool in the order of `seed`."""
    order = list(range(layout.num_blocks[0]))
    Random(seed).shuffle(order)
    return tuple(order[first : first + count])


class Grants:
    """`DestinationEvents` and `WorkerFace` of a destination that grants at once. A transfer is called `number/first block/blocks`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.destination: Destination

    def offered(self, transfer_id: str, prompt_tokens: int) -> None:
        _, first, count = map(int, transfer_id.split("/"))
        blocks = blocks_of(self._layout, 2, first, count)
        self.destination.grant(transfer_id, (GroupGrant(0, blocks),) * len(self._layout.groups))

    def nearly_done(self, transfer_id: str) -> None: ...
    def committed(
        self, transfer_id: str, first_tokens: tuple[Token, ...], kv_bytes: int, seconds: float, lacking: tuple[int, ...]
    ) -> None: ...
    def released(self, transfer_id: str) -> None: ...

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        """The source hears of it too, and says so."""

    async def lane(self, lane: Lane) -> None:
        await self.destination.serve_lane(lane)

    async def attached(self, stream: RouterStream) -> None:
        raise NotImplementedError

    async def reports(self) -> AsyncGenerator[WorkerReport, None]:
        raise NotImplementedError
        yield

    async def drain(self, timeout_s: float) -> int:
        raise NotImplementedError


class There:
    """The other process, which answers what `Here` asks."""

    def __init__(self, layout: Layout, pool: Pool, destination: Destination) -> None:
        self.layout, self.pool, self.destination = layout, pool, destination

    async def answer(self, pipe: Connection, asked: tuple[Any, ...]) -> None:
        _, *names = asked
        for name in names:
            self.destination.expect(name)
        pipe.send(None)

    def close(self) -> None: ...


def other_process(pipe: Connection, layout: Layout, transport: Transport, there: type[There], gpu: str | None) -> None:
    """The destination's, until the pipe says None."""
    if transport.on_gpu:
        see_gpu(gpu)
    torch.set_num_threads(1)
    try:
        asyncio.run(_answer(pipe, layout, transport, there))
    except DiptychError as error:
        pipe.send(error)


async def _answer(pipe: Connection, layout: Layout, transport: Transport, kind: type[There]) -> None:
    pool, grants = Pool.allocate(layout, device_for(transport)), Grants(layout)
    only: dict[str, Any] = {"transports": (transport,), "host": HOST}
    grants.destination = Destination("D", 2, pool, layout, MonotonicClock(), LEASE_S, LEASE_S, grants, **only)
    server = await serve(f"{HOST}:0", worker=grants)
    pipe.send(server.address)
    there = kind(layout, pool, grants.destination)
    while (asked := await asyncio.to_thread(pipe.recv)) is not None:
        await there.answer(pipe, asked)
    there.close()
    await grants.destination.close()
    await server.stop(0)
    pool.close()


class Here:
    """`SourceEvents`, and what is asked of the other process."""

    def __init__(self, layout: Layout, pool: Pool, pipe: Connection, address: str, transport: Transport) -> None:
        self.layout, self.pool = layout, pool
        self._pipe, self._address = pipe, address
        only: dict[str, Any] = {"transports": (transport,), "host": HOST}
        self.source = Source("P", 1, pool, layout, MonotonicClock(), LEASE_S, self, **only)
        self._made = 0
        self.moved = 0
        self._waits: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._error: DiptychError | None = None

    def tell(self, *said: object) -> None:
        self._pipe.send(said)

    async def hear(self) -> Any:
        return await heard(self._pipe)

    async def ask(self, *question: object) -> Any:
        self.tell(*question)
        return await self.hear()

    def wait(self, what: str, transfer_id: str) -> asyncio.Future[None]:
        """Done when it is so; once a transfer has failed with its error."""
        found = self._waits.setdefault((what, transfer_id), asyncio.get_running_loop().create_future())
        if self._error is not None and not found.done():
            found.set_exception(self._error)
        return found

    def granted(self, transfer_id: str) -> None:
        self._came("granted", transfer_id)

    def turned_away(self) -> None: ...

    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None:
        self.moved += kv_bytes

    def released(self, transfer_id: str) -> None:
        self._came("released", transfer_id)

    def _came(self, what: str, transfer_id: str) -> None:
        if self._error is None:
            self.wait(what, transfer_id).set_result(None)

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        self._error = error
        for waiting in self._waits.values():
            if not waiting.done():
                waiting.set_exception(error)

    async def granted_transfers(self, tokens: int, count: int) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
        """`count` transfers of `tokens` each, with their tables: the pool's blocks in their order."""
        each = -(-tokens // self.layout.block_size)
        names = [f"{self._made + i}/{i * each}/{each}" for i in range(count)]
        self._made += count
        await self.ask("expect", *names)
        for name in names:
            self.source.offer(name, self._address, tokens)
            await self.wait("granted", name)
        tables = [(blocks_of(self.layout, 1, i * each, each),) * len(self.layout.groups) for i in range(count)]
        return list(zip(names, tables, strict=True))

    async def grant_time(self) -> float:
        """Seconds from an offer of one block until its grant is here: a message there and one back. What was granted is committed."""
        name = f"{self._made}/0/1"
        self._made += 1
        await self.ask("expect", name)
        begun = time.perf_counter()
        self.source.offer(name, self._address, self.layout.block_size)
        await self.wait("granted", name)
        taken = time.perf_counter() - begun
        await self._commit(name, (blocks_of(self.layout, 1, 0, 1),) * len(self.layout.groups), self.layout.block_size)
        return taken

    async def hand_over_time(self, tokens: int) -> float:
        """Seconds from `tokens` stored in all layers, and committed at once, until the source may free them."""
        ((name, tables),) = await self.granted_transfers(tokens, 1)
        begun = time.perf_counter()
        await self._commit(name, tables, tokens)
        return time.perf_counter() - begun

    async def _commit(self, name: str, tables: tuple[tuple[int, ...], ...], tokens: int) -> None:
        layers = tuple(layer for group in self.layout.groups for layer in group.layers)
        for layer in layers:
            self.pool.stored(layer)
        self.source.computed(name, layers, 0, tokens, tables)
        await asyncio.sleep(0)
        self.source.commit(name, TOKENS)
        await self.wait("released", name)

    def close(self) -> None: ...


async def heard(pipe: Connection) -> Any:
    """What the other process says. Raises the `DiptychError` that it says, and `Unavailable` if it has ended."""
    try:
        said = await asyncio.to_thread(pipe.recv)
    except EOFError:
        raise Unavailable("The process at the other end of a link ended.") from None
    if isinstance(said, DiptychError):
        raise said
    return said


H = TypeVar("H", bound=Here)


@asynccontextmanager
async def two_ends(
    layout: Layout, transport: Transport, here: type[H], there: type[There] = There, gpu: str | None = None
) -> AsyncIterator[H]:
    """Both ends, joined by a lane with the first transfer. `gpu`: the one that the other process sees, if another than this."""
    pipe, far = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=other_process, args=(far, layout, transport, there, gpu), daemon=True)
    child.start()
    far.close()
    pool = None
    try:
        pool = Pool.allocate(layout, device_for(transport))
        made = here(layout, pool, pipe, await heard(pipe), transport)
        yield made
        await made.source.close()
        made.close()
        pipe.send(None)
        await asyncio.to_thread(child.join, LEASE_S)
    finally:
        child.kill()
        if pool is not None:
            pool.close()
