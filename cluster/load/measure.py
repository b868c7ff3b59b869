"""One run: the load, with the client's own cost taken beside it."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .answer import Answer
from .open_loop import Asker, heartbeat, open_loop
from .report import Client
from .workload import Arrival


@dataclass(slots=True)
class Run:
    """What a run has brought so far. `unfinished`: requests that were cut off."""

    answers: list[Answer] = field(default_factory=list)
    sent: int = 0
    errors: int = 0
    unfinished: int = 0
    client: Client = field(default_factory=lambda: Client(0.0, 0.0, ()))


async def measure(asker: Asker, arrivals: Iterable[Arrival], stop: asyncio.Event, on_change: Callable[[Run], None]) -> Run:
    """Run the load to its end, or until `stop` is set. `on_change` is called after each sending and each answer."""
    run = Run()

    def answered(answer: Answer) -> None:
        run.answers.append(answer)
        run.errors += answer.error is not None
        on_change(run)

    def sent() -> None:
        run.sent += 1
        on_change(run)

    with _few_collections():
        began, cpu = time.perf_counter(), _cpu_seconds()
        async with heartbeat() as late:
            run.unfinished = await open_loop(asker, arrivals, stop, answered, sent)
        run.client = Client(time.perf_counter() - began, _cpu_seconds() - cpu, tuple(late))
    return run


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def _few_collections() -> Iterator[None]:
    """What is loaded already is not searched for garbage meanwhile: a full search takes 50 ms with this program's modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
