"""What the engines of a small cluster compute, step by step, as its processes record it while it serves."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ...core.recordings import Doing
from ..spans.collect import recording
from ..spans.taken import Process, nested
from ..supervising import state

LONGEST_S = 120.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ran:
    """A step of so many attempts. Seconds of the clock that all processes of a host have; it `began` when the step before it ended, or,
    where there had been nothing to compute, when it did: so what the engine waits for a decision is in it."""

    attempts: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


async def with_steps(cluster: str, asked: Awaitable[T]) -> tuple[T, Mapping[str, tuple[Ran, ...]]]:
    """What comes of `asked`, and meanwhile the steps of each worker of the cluster, by its phase: of those that had begun and ended."""
    found = state.running(cluster)
    assert found.control is not None, "a cluster that is up has a router"
    async with recording(found.control, found.internal_tls, LONGEST_S) as taken:
        result = await asked
    return result, {process.phase: steps_of(process) for process in taken.processes}


def steps_of(process: Process) -> tuple[Ran, ...]:
    """In their order. One that a GPU was asked for ends when its output is there, which another thread waits for (`worker.look_ahead`)."""
    found = []
    there = {span.step: span.ended for span in process.recorded.spans if span.doing is Doing.UNDER_WAY and span.step >= 0}
    for nodes in nested(process.recorded.spans).values():
        before = None
        for span in (node.span for node in nodes):
            if span.doing is Doing.STEP:
                began, ended = span.began if before is None else before, max(span.ended, there.get(span.step, 0))
                found.append(Ran(len(span.who), (began - process.ahead) / 1e9, (ended - process.ahead) / 1e9))
                before = ended
            elif span.doing is Doing.IDLE:
                before = None
    return tuple(found)
