"""The ranks of a worker as one process: they start together, and all end when one does.

Rank 0 leads. It starts first and says where the others shall meet it; what it says, and how it ends, is what the worker says, and how
that ends. Of the others only two things are told: that they have started, and why it ended, if one of them was the first to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from ...core.errors import DiptychError
from ..process.child import DIED
from ..process.launcher import Launch, Launcher, Running

MOMENT_S = 5.0
"""How long the others may take to end by themselves when one has ended; a rank that loses another ends at once."""

Event = dict[str, Any]


async def start(launcher: Launcher, launch: Launch) -> Running:
    """Start a process, and those that follow it; raises `DiptychError` as the launcher does."""
    leader = await launcher.start(launch)
    return Together(launcher, launch, leader) if launch.followers else leader


def first_fault(ends: Sequence[tuple[int, int | None]]) -> tuple[int, int | None]:
    """Whose end (rank, exit status) is the reason of the others', of ends in the order in which they were seen; (0, 0) if all ended well.

    A rank that loses another ends with `DIED`, and perhaps is seen first: on Ray their ends come by ways of their own.
    """
    bad = [end for end in ends if end[1] != 0]
    return next((end for end in bad if end[1] != DIED), bad[0] if bad else (0, 0))


class Together:
    """A `Running` over all ranks of a worker.

    Beside the leader's, its events are `started` (rank, pid) of each follower and, when all have ended, what the first that ended badly
    has to say: its `failed`, with its `rank`, or if there is none and it was a follower, `died` (rank, status).
    """

    def __init__(self, launcher: Launcher, launch: Launch, leader: Running) -> None:
        self._launcher, self._launch, self._leader = launcher, launch, leader
        self._running: dict[int, Running] = {}
        self._ends: list[tuple[int, int | None]] = []
        """Rank and exit status, as they ended."""
        self._reasons: dict[int, Event] = {}
        """What a rank said of its failure. One that loses another says so too, and is not the one to hear."""
        self._one_ended = asyncio.Event()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._met = self._killed = False
        self._lives: set[asyncio.Task[None]] = {asyncio.create_task(self._live(0, leader))}
        self._whole = asyncio.create_task(self._hold())

    @property
    def pid(self) -> int | None:
        return self._leader.pid

    async def lines(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            yield event

    async def wait(self) -> int | None:
        """The leader's exit status, once no rank runs any more."""
        await asyncio.shield(self._whole)
        return await self._leader.wait()

    def send(self, line: str) -> None:
        """To the leader, which tells the others."""
        self._leader.send(line)

    def terminate(self) -> None:
        """The leader finishes what it has, and ends the others."""
        self._leader.terminate()

    def kill(self) -> None:
        self._killed = True
        for running in self._running.values():
            running.kill()

    async def _hold(self) -> None:
        await self._one_ended.wait()
        await asyncio.wait(self._lives, timeout=MOMENT_S)
        self.kill()
        await asyncio.wait(self._lives)
        rank, status = first_fault(self._ends)
        if reason := self._reasons.get(rank):
            self._events.put_nowait({**reason, "rank": rank})
        elif rank:
            self._events.put_nowait({"event": "died", "rank": rank, "status": status})
        self._events.put_nowait(None)
        for life in self._lives:
            life.result()

    async def _live(self, rank: int, running: Running) -> None:
        """One rank, from its start to its end."""
        status: int | None = None
        self._running[rank] = running
        try:
            if self._killed:
                running.kill()
            async for event in running.lines():
                self._heard(rank, event)
            status = await running.wait()
        finally:
            del self._running[rank]
            self._end(rank, status)

    async def _follow(self, launch: Launch) -> None:
        try:
            running = await self._launcher.start(launch, self._leader)
        except DiptychError as error:
            self._reasons[launch.rank] = {"event": "failed", "message": error.message, "field": error.field}
            self._end(launch.rank, None)
            return
        self._events.put_nowait({"event": "started", "rank": launch.rank, "pid": running.pid})
        await self._live(launch.rank, running)

    def _heard(self, rank: int, event: Event) -> None:
        match event["event"]:
            case "failed":
                self._reasons[rank] = event
            case "meeting" if rank == 0 and not self._met:
                self._met = True
                for follower in self._launch.followers:
                    argv = (*follower.argv, "--leader", str(event["address"]))
                    self._lives.add(asyncio.create_task(self._follow(replace(follower, argv=argv))))
            case _ if rank == 0:
                self._events.put_nowait(event)

    def _end(self, rank: int, status: int | None) -> None:
        self._ends.append((rank, status))
        self._one_ended.set()
