"""The face: reports are bounded in number, drain waits, and a worker that receives no KV says so."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from diptych.core.errors import Unavailable
from diptych.core.fleet import WorkerReport, WorkerState
from diptych.worker.face import Face
from diptych.worker.outbox import Delivery

FIRST = WorkerReport("w", 1, WorkerState.READY, 0, 0, 0, 8, 8, 0)


class Role:
    """A role that is only told."""

    def __init__(self) -> None:
        self.draining = False

    def command(self, listener: object, command: object) -> None:
        raise AssertionError

    def detached(self, listener: object) -> None:
        raise AssertionError

    def drain(self) -> None:
        self.draining = True


def face(role: Role | None = None) -> Face:
    return Face(role or Role(), post=lambda call: call(), first_report=FIRST, serve_lane=None)


def told(report: WorkerReport, *, idle: bool) -> Delivery:
    return Delivery((), (), report, idle)


def test_a_worker_that_changes_often_reports_now_and_then_and_its_last_word() -> None:
    async def main() -> None:
        one = face()
        seen: list[int] = []

        async def watch() -> None:
            async for report in one.reports():
                seen.append(report.running)

        watcher = asyncio.create_task(watch())
        end = time.monotonic() + 0.3
        running = 0
        while time.monotonic() < end:
            running += 1
            one.deliver(told(replace(FIRST, running=running), idle=False))
            await asyncio.sleep(0.001)
        async with asyncio.timeout(60):
            while seen[-1] != running:  # noqa: ASYNC110  it watches what has no event
                await asyncio.sleep(0.001)
        watcher.cancel()
        assert len(seen) <= 0.4 / 0.05 + 2

    asyncio.run(main())


def test_drain_returns_when_idle_or_with_what_is_left() -> None:
    async def main() -> None:
        role = Role()
        one = face(role)
        one.deliver(told(replace(FIRST, running=2, leases=1), idle=False))
        assert await one.drain(0.01) == 2
        assert role.draining
        waiting = asyncio.create_task(one.drain(60.0))
        await asyncio.sleep(0)
        one.deliver(told(replace(FIRST, state=WorkerState.DRAINING, running=1), idle=False))
        await asyncio.sleep(0)
        assert not waiting.done()
        one.deliver(told(replace(FIRST, state=WorkerState.DRAINING), idle=True))
        assert await waiting == 0

    asyncio.run(main())


def test_a_lane_to_a_prefill_worker_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(Unavailable):
            await face().lane(object())

    asyncio.run(main())
