"""The ranks of a worker as one process: they start when the leader says where, and one that ends ends them all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.process.child import DIED
from diptych.cluster.process.launcher import Launch, Running
from diptych.cluster.supervising import together
from diptych.cluster.supervising.together import first_fault, start
from diptych.core.errors import ConfigError, DiptychError

LAUNCH = Launch(
    "w", ("run", "0"), Path("w"), followers=tuple(Launch(f"w.rank{n}", ("run", str(n)), Path(f"w.rank{n}"), rank=n) for n in (1, 2))
)
MEETING = {"event": "meeting", "address": "here:1"}
READY = {"event": "ready", "address": "there:2"}


@dataclass
class FakeRank:
    """A `Running` whose life is told."""

    pid: int | None
    said: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    status: int | None = None
    sent: list[str] = field(default_factory=list)
    terminated: bool = False
    killed: bool = False

    def say(self, **event: Any) -> None:
        self.said.put_nowait(event)

    def end(self, status: int | None) -> None:
        if not self.ended.is_set():
            self.status = status
            self.said.put_nowait(None)
            self.ended.set()

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        while (event := await self.said.get()) is not None:
            yield event

    async def wait(self) -> int | None:
        await self.ended.wait()
        return self.status

    def send(self, line: str) -> None:
        self.sent.append(line)

    def terminate(self) -> None:
        self.terminated = True

    def kill(self) -> None:
        self.killed = True
        self.end(-9)


@dataclass
class FakeLauncher:
    ranks: list[FakeRank] = field(default_factory=lambda: [FakeRank(100 + rank) for rank in range(3)])
    started: list[Launch] = field(default_factory=list)
    leaders: list[Running | None] = field(default_factory=list)
    all_asked: asyncio.Event = field(default_factory=asyncio.Event)
    refuses: DiptychError | None = None
    """Said in place of starting rank 2."""
    waits: asyncio.Event | None = None
    """Rank 2 is not started before."""

    async def start(self, launch: Launch, leader: Running | None = None) -> FakeRank:
        self.started.append(launch)
        self.leaders.append(leader)
        if len(self.started) == 3:
            self.all_asked.set()
        if launch.rank == 2 and self.waits:
            await self.waits.wait()
        if launch.rank == 2 and self.refuses:
            raise self.refuses
        return self.ranks[launch.rank]

    async def close(self) -> None:
        return None


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for."""
    monkeypatch.setattr(together, "MOMENT_S", 0.0)


Story = Callable[[FakeLauncher, Running], Awaitable[None]]


async def told(story: Story, launcher: FakeLauncher | None = None) -> tuple[list[dict[str, Any]], int | None]:
    """All the events, and the exit status, of a worker to which this happens."""
    launcher = launcher or FakeLauncher()
    running = await start(launcher, LAUNCH)
    telling = asyncio.create_task(story(launcher, running))
    async with asyncio.timeout(10):
        events = [event async for event in running.lines()]
        status = await running.wait()
    await telling
    assert all(rank.ended.is_set() for rank, _ in zip(launcher.ranks, launcher.started, strict=False) if not launcher.refuses)
    return events, status


async def met(launcher: FakeLauncher) -> tuple[FakeRank, FakeRank, FakeRank]:
    leader, first, second = launcher.ranks
    leader.said.put_nowait(MEETING)
    await launcher.all_asked.wait()
    return leader, first, second


STARTED = [{"event": "started", "rank": 1, "pid": 101}, {"event": "started", "rank": 2, "pid": 102}]


def test_one_alone_is_itself() -> None:
    async def check() -> None:
        launcher = FakeLauncher()
        assert await start(launcher, Launch("w", ("run",), Path("w"))) is launcher.ranks[0]

    asyncio.run(check())


def test_the_others_start_at_the_meeting_and_only_the_leader_is_heard() -> None:
    async def story(launcher: FakeLauncher, running: Running) -> None:
        assert len(launcher.started) == 1
        leader, first, second = await met(launcher)
        assert [launch.argv for launch in launcher.started[1:]] == [("run", str(n), "--leader", "here:1") for n in (1, 2)]
        assert launcher.leaders == [None, leader, leader]
        first.say(event="progress", what="warm")
        first.say(event="ready", rank=1)
        leader.said.put_nowait(READY)
        assert running.pid == 100
        running.terminate()
        assert [rank.terminated for rank in launcher.ranks] == [True, False, False]
        for rank in (first, second, leader):
            rank.end(0)

    events, status = asyncio.run(told(story))
    assert events == [*STARTED, READY]
    assert status == 0


def test_a_leader_that_dies_before_the_meeting_has_no_followers() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        launcher.ranks[0].say(event="failed", message="no", field="kv_tokens")
        launcher.ranks[0].end(2)

    launcher = FakeLauncher()
    assert asyncio.run(told(story, launcher)) == ([{"event": "failed", "message": "no", "field": "kv_tokens", "rank": 0}], 2)
    assert len(launcher.started) == 1


def test_a_follower_that_cannot_start_says_why_for_all() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        leader, first, second = await met(launcher)
        second.say(event="failed", message="no", field="threads")
        second.end(2)
        await asyncio.sleep(0)
        leader.say(event="failed", message="rank 2 has gone", field=None)
        leader.end(70)
        first.end(70)

    events, status = asyncio.run(told(story))
    assert [event for event in events if event["event"] != "started"] == [
        {"event": "failed", "message": "no", "field": "threads", "rank": 2}
    ]
    assert status == 70


def test_a_follower_that_crashes_is_told_of_although_others_say_that_it_has_gone() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        leader, first, second = await met(launcher)
        leader.say(event="failed", message="rank 2 has gone", field=None)
        second.end(1)
        await asyncio.sleep(0)
        leader.end(2)
        first.say(event="failed", message="the leader has gone", field=None)
        first.end(2)

    events, status = asyncio.run(told(story))
    assert events == [*STARTED, {"event": "died", "rank": 2, "status": 1}]
    assert status == 2


def test_a_follower_that_is_killed_is_told_of_before_those_it_drew_with_it() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        leader, first, second = await met(launcher)
        leader.said.put_nowait(READY)
        first.end(-9)
        await asyncio.sleep(0)
        leader.end(70)
        second.end(70)

    events, status = asyncio.run(told(story))
    assert events[-1] == {"event": "died", "rank": 1, "status": -9}
    assert status == 70


@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        ([(0, 0), (1, 0)], (0, 0)),
        ([(0, DIED), (1, DIED)], (0, DIED)),
        ([(2, DIED), (0, DIED), (1, -9)], (1, -9)),
        ([(1, 1), (0, -9)], (1, 1)),
        ([(0, 0), (1, None)], (1, None)),
    ],
)
def test_who_only_lost_another_is_not_the_reason(ends: list[tuple[int, int | None]], fault: tuple[int, int | None]) -> None:
    assert first_fault(ends) == fault


def test_a_leader_that_is_killed_is_the_worker_that_is() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        leader, first, second = await met(launcher)
        leader.end(-9)
        await asyncio.sleep(0)
        first.end(70)
        second.end(70)

    events, status = asyncio.run(told(story))
    assert events == STARTED
    assert status == -9


@pytest.mark.usefixtures("moment")
def test_who_does_not_end_by_itself_is_killed() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        _, first, _ = await met(launcher)
        first.end(-11)

    launcher = FakeLauncher()
    events, status = asyncio.run(told(story, launcher))
    assert events[-1] == {"event": "died", "rank": 1, "status": -11}
    assert status == -9
    assert [rank.killed for rank in launcher.ranks] == [True, False, True]


@pytest.mark.usefixtures("moment")
def test_a_follower_that_finds_no_place_ends_the_worker() -> None:
    async def story(launcher: FakeLauncher, _: Running) -> None:
        await met(launcher)

    launcher = FakeLauncher(refuses=ConfigError("no node", field="ray.address"))
    events, status = asyncio.run(told(story, launcher))
    assert {"event": "failed", "message": "no node", "field": "ray.address", "rank": 2} in events
    assert status == -9
    assert [rank.killed for rank in launcher.ranks[:2]] == [True, True]


def test_a_kill_is_for_all_and_for_one_that_starts_only_then() -> None:
    async def story(launcher: FakeLauncher, running: Running) -> None:
        assert launcher.waits
        await met(launcher)
        running.kill()
        launcher.waits.set()

    launcher = FakeLauncher(waits=asyncio.Event())
    _, status = asyncio.run(told(story, launcher))
    assert status == -9
    assert [rank.killed for rank in launcher.ranks] == [True, True, True]
