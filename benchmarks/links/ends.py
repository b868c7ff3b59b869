"""The two ends whose transfers `diptych profile` times, here with the raw link beside the hinge, and whole pools handed over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager
from multiprocessing.connection import Connection
from typing import Any

from diptych.benchmarks.links.raw_gpu import raw_link
from diptych.cluster.profiling import ends
from diptych.cluster.profiling.ends import LEASE_S, TOKENS
from diptych.cluster.resources.devices import visible_gpus
from diptych.core.layout import Layout
from diptych.core.transfer import Transport
from diptych.kv_transfer.destination import Destination
from diptych.kv_transfer.pool import Pool

__all__ = ["LEASE_S", "TOKENS", "Here", "rate", "two_workers"]

AT_ONCE = 8
"""Transfers under way at a time: enough that none waits for another's Ack, few enough that what is announced is soon copied."""


class There(ends.There):
    """Answers for the raw link too."""

    def __init__(self, layout: Layout, pool: Pool, destination: Destination) -> None:
        super().__init__(layout, pool, destination)
        self.raw = raw_link(pool, layout, 1)

    async def answer(self, pipe: Connection, asked: tuple[Any, ...]) -> None:
        match asked:
            case ("join", path):
                await asyncio.to_thread(self.raw.join, path)
            case ("map", endpoint):
                await self.raw.map(endpoint)
                pipe.send(None)
            case ("copy", piece):
                pipe.send(await asyncio.to_thread(self.raw.copy, piece))
            case ("cpu",):
                pipe.send(time.process_time())
            case ("receive", piece):
                pipe.send(await asyncio.to_thread(self.raw.receive, piece))
            case _:
                await super().answer(pipe, asked)

    def close(self) -> None:
        self.raw.close()


class Here(ends.Here):
    """`raw`: this end of the raw link."""

    def __init__(self, layout: Layout, pool: Pool, pipe: Connection, address: str, transport: Transport) -> None:
        super().__init__(layout, pool, pipe, address, transport)
        self.raw = raw_link(pool, layout, 0)

    async def taking(self, moving: Awaitable[float]) -> tuple[float, float]:
        """The seconds that `moving` says, and the CPU seconds that both processes take meanwhile."""
        begun = time.process_time() + await self.ask("cpu")
        seconds = await moving
        return seconds, time.process_time() + await self.ask("cpu") - begun

    async def pass_over(self, tokens: int, count: int) -> float:
        """Seconds to hand over `count` transfers of `tokens`, granted before, each layer stored and announced by itself."""
        transfers, places = await self.granted_transfers(tokens, count), asyncio.Semaphore(AT_ONCE)
        self.moved, begun = 0, time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for name, tables in transfers:
                await places.acquire()
                group.create_task(self._hand_over(name, tables, tokens)).add_done_callback(lambda _: places.release())
        taken = time.perf_counter() - begun
        expected = count * tokens * sum(len(each.layers) * each.token_bytes for each in self.layout.groups)
        if self.moved != expected:
            raise RuntimeError(f"{self.moved} bytes were handed over, not {expected}")
        return taken

    async def _hand_over(self, name: str, tables: tuple[tuple[int, ...], ...], tokens: int) -> None:
        for layer in sorted(layer for group in self.layout.groups for layer in group.layers):
            self.pool.stored(layer)
            self.source.computed(name, (layer,), 0, tokens, tables)
            await asyncio.sleep(0)  # the loop turns, so that the next layer is a piece of its own
        self.source.commit(name, TOKENS)
        await self.wait("released", name)

    async def last_block(self) -> float:
        """Seconds from one block stored in all layers, and committed at once, until the source may free it."""
        return await self.hand_over_time(self.layout.block_size)

    def close(self) -> None:
        self.raw.close()


def two_workers(layout: Layout, transport: Transport) -> AbstractAsyncContextManager[Here]:
    """Both ends, joined by a lane with the first transfer; each on a GPU of its own, if there are two."""
    gpus = visible_gpus()
    return ends.two_ends(layout, transport, Here, There, gpus[1].key if len(gpus) > 1 else None)


def rate(layout: Layout, seconds: Sequence[float]) -> float:
    """GB/s of the median of passes over the whole pool."""
    size = layout.num_blocks[0] * layout.block_size * sum(len(group.layers) * group.token_bytes for group in layout.groups)
    return size / sorted(seconds)[len(seconds) // 2] / 1e9
