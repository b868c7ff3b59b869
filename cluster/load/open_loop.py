"""An open-loop load: requests are sent when their time has come, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from .answer import Answer
from .workload import Arrival

BEAT_S = 0.02
"""How often the client's event loop is asked how late it wakes: 50 times a second cost 0.2 % of a core."""


class Asker(Protocol):
    """What a load needs of a server."""

    def prepare(self, arrival: Arrival) -> bytes: ...

    async def ask(self, arrival: Arrival, body: bytes, begin: float) -> Answer: ...


async def open_loop(
    asker: Asker, arrivals: Iterable[Arrival], stop: asyncio.Event, on_answer: Callable[[Answer], None], on_sent: Callable[[], None]
) -> int:
    """Send everything and hand over each answer as it ends. When `stop` is set nothing more is sent and what is under way is cut
    off; how many that were."""
    begin = time.perf_counter()
    stopped = asyncio.create_task(stop.wait())
    running: set[asyncio.Task[Answer]] = set()

    def ended(task: asyncio.Task[Answer]) -> None:
        running.discard(task)
        if not task.cancelled() and task.exception() is None:
            on_answer(task.result())

    try:
        for arrival in arrivals:
            body = asker.prepare(arrival)
            await asyncio.wait({stopped}, timeout=max(0.0, begin + arrival.at - time.perf_counter()))
            if stop.is_set():
                break
            task = asyncio.create_task(asker.ask(arrival, body, begin))
            task.add_done_callback(ended)
            running.add(task)
            on_sent()
        while running and not stop.is_set():
            await asyncio.wait({stopped, *running}, return_when=asyncio.FIRST_COMPLETED)
        return len(running)
    finally:
        left = [stopped, *running]
        for task_left in left:
            task_left.cancel()
        results = await asyncio.gather(*left, return_exceptions=True)
        _raise_defects(results)


def _raise_defects(results: list[object]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


@asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """Samples, growing while the context lasts, of how late the event loop wakes, in seconds: what any event may have waited."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            due = time.perf_counter() + BEAT_S
            await asyncio.sleep(BEAT_S)
            late.append(time.perf_counter() - due)

    task = asyncio.create_task(beat())
    try:
        yield late
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
