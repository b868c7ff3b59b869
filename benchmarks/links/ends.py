"""Two workers' ends of the hinge in two processes: pools, `Source`, `Destination` and the lane as in production, and no engine.

This process has the source and asks; the other has the destination and answers over a pipe. Both ends use their pool's blocks in an order
of their own, as pools do that have been in use for a while, so no two blocks of a transfer are neighbours at both ends.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import torch
from diptych.benchmarks.links.raw_gpu import raw_link
from diptych.core.clock import MonotonicClock
from diptych.core.errors import DiptychError
from diptych.core.fleet import WorkerReport
from diptych.core.layout import Layout
from diptych.core.request import Token
from diptych.core.transfer import GroupGrant, Transport
from diptych.kv_transfer.destination import Destination
from diptych.kv_transfer.pool import CPU, Pool
from diptych.kv_transfer.source import Source
from diptych.rpc.lane import Lane
from diptych.rpc.server import serve
from diptych.rpc.worker import RouterStream

LEASE_S = 60.0
HOST = "127.0.0.1"
TOKENS = (Token(0, 42),)
AT_ONCE = 8
"""Transfers under way at a time: enough that none waits for another's Ack, few enough that what is announced is soon copied."""


def device_for(transport: Transport) -> torch.device:
    """Where the pools are. Both processes share a GPU."""
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
    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], kv_bytes: int, seconds: float) -> None: ...
    def released(self, transfer_id: str) -> None: ...

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        raise error

    async def lane(self, lane: Lane) -> None:
        await self.destination.serve_lane(lane)

    async def attached(self, stream: RouterStream) -> None:
        raise NotImplementedError

    async def reports(self) -> AsyncGenerator[WorkerReport, None]:
        raise NotImplementedError
        yield

    async def drain(self, timeout_s: float) -> int:
        raise NotImplementedError


def other_process(pipe: Connection, layout: Layout, transport: Transport) -> None:
    """The destination's, until the pipe says None."""
    torch.set_num_threads(1)
    asyncio.run(_answer(pipe, layout, transport))


async def _answer(pipe: Connection, layout: Layout, transport: Transport) -> None:
    pool, grants = Pool.allocate(layout, device_for(transport)), Grants(layout)
    only: dict[str, Any] = {"transports": (transport,), "host": HOST}
    grants.destination = Destination("D", 2, pool, layout, MonotonicClock(), LEASE_S, LEASE_S, grants, **only)
    server = await serve(f"{HOST}:0", worker=grants)
    pipe.send(server.address)
    raw = raw_link(pool, layout, 1)
    while (asked := await asyncio.to_thread(pipe.recv)) is not None:
        match asked:
            case ("expect", *names):
                for name in names:
                    grants.destination.expect(name)
                pipe.send(None)
            case ("join", path):
                await asyncio.to_thread(raw.join, path)
            case ("map", endpoint):
                await raw.map(endpoint)
                pipe.send(None)
            case ("copy", piece):
                pipe.send(await asyncio.to_thread(raw.copy, piece))
            case ("receive", piece):
                pipe.send(await asyncio.to_thread(raw.receive, piece))
    raw.close()
    await grants.destination.close()
    await server.stop(0)
    pool.close()


class Here:
    """`SourceEvents`, and what is asked of the other process."""

    def __init__(self, layout: Layout, pool: Pool, pipe: Connection, address: str, transport: Transport) -> None:
        self._layout, self._pipe, self._address = layout, pipe, address
        self.pool, self.raw = pool, raw_link(pool, layout, 0)
        only: dict[str, Any] = {"transports": (transport,), "host": HOST}
        self.source = Source("P", 1, pool, layout, MonotonicClock(), LEASE_S, self, **only)
        self._made = self._moved = 0
        self._waits: dict[tuple[str, str], asyncio.Future[None]] = {}

    def tell(self, *said: object) -> None:
        self._pipe.send(said)

    async def hear(self) -> Any:
        return await asyncio.to_thread(self._pipe.recv)

    async def ask(self, *question: object) -> Any:
        self.tell(*question)
        return await self.hear()

    def _wait(self, what: str, transfer_id: str) -> asyncio.Future[None]:
        return self._waits.setdefault((what, transfer_id), asyncio.get_running_loop().create_future())

    def granted(self, transfer_id: str) -> None:
        self._wait("granted", transfer_id).set_result(None)

    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None:
        self._moved += kv_bytes

    def released(self, transfer_id: str) -> None:
        self._wait("released", transfer_id).set_result(None)

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        raise error

    async def granted_transfers(self, tokens: int, count: int) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
        """`count` transfers of `tokens` each, with their tables: the pool's blocks in their order."""
        each = -(-tokens // self._layout.block_size)
        names = [f"{self._made + i}/{i * each}/{each}" for i in range(count)]
        self._made += count
        await self.ask("expect", *names)
        for name in names:
            self.source.offer(name, self._address, tokens)
            await self._wait("granted", name)
        tables = [(blocks_of(self._layout, 1, i * each, each),) * len(self._layout.groups) for i in range(count)]
        return list(zip(names, tables, strict=True))

    async def pass_over(self, tokens: int, count: int) -> float:
        """Seconds to hand over `count` transfers of `tokens`, granted before, each layer stored and announced by itself."""
        transfers, places = await self.granted_transfers(tokens, count), asyncio.Semaphore(AT_ONCE)
        self._moved, begun = 0, time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for name, tables in transfers:
                await places.acquire()
                group.create_task(self._hand_over(name, tables, tokens)).add_done_callback(lambda _: places.release())
        taken = time.perf_counter() - begun
        expected = count * tokens * sum(len(each.layers) * each.token_bytes for each in self._layout.groups)
        if self._moved != expected:
            raise RuntimeError(f"{self._moved} bytes were handed over, not {expected}")
        return taken

    async def _hand_over(self, name: str, tables: tuple[tuple[int, ...], ...], tokens: int) -> None:
        for layer in sorted(layer for group in self._layout.groups for layer in group.layers):
            self.pool.stored(layer)
            self.source.computed(name, (layer,), 0, tokens, tables)
            await asyncio.sleep(0)  # the loop turns, so that the next layer is a piece of its own
        self.source.commit(name, TOKENS)
        await self._wait("released", name)

    async def last_block(self) -> float:
        """Seconds from one block stored in all layers, and committed at once, until the source may free it."""
        ((name, tables),) = await self.granted_transfers(self._layout.block_size, 1)
        layers = tuple(layer for group in self._layout.groups for layer in group.layers)
        begun = time.perf_counter()
        for layer in layers:
            self.pool.stored(layer)
        self.source.computed(name, layers, 0, self._layout.block_size, tables)
        await asyncio.sleep(0)
        self.source.commit(name, TOKENS)
        await self._wait("released", name)
        return time.perf_counter() - begun


@asynccontextmanager
async def two_workers(layout: Layout, transport: Transport) -> AsyncIterator[Here]:
    """Both ends, joined by a lane with the first transfer."""
    pipe, far = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=other_process, args=(far, layout, transport), daemon=True)
    child.start()
    far.close()
    pool = Pool.allocate(layout, device_for(transport))
    try:
        here = Here(layout, pool, pipe, await asyncio.to_thread(pipe.recv), transport)
        yield here
        await here.source.close()
        here.raw.close()
        pipe.send(None)
        await asyncio.to_thread(child.join, LEASE_S)
    finally:
        child.kill()
        pool.close()


def rate(layout: Layout, seconds: Sequence[float]) -> float:
    """GB/s of the median of passes over the whole pool."""
    size = layout.num_blocks[0] * layout.block_size * sum(len(group.layers) * group.token_bytes for group in layout.groups)
    return size / sorted(seconds)[len(seconds) // 2] / 1e9
