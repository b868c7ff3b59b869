"""The supervisor: keeps every process of the cluster running, and tells the router which workers there are.

A post is a place in the cluster that one process fills. While the cluster starts, any failure ends it, with the reason. Later a
process that dies is started again, after a delay and at most so often (`RestartBudget`); a worker then is another incarnation. The
cluster ends when the router, or the last decode worker, cannot be brought back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter

from ..core.clock import Clock, MonotonicClock
from ..core.errors import ConfigError, DiptychError, Unavailable
from ..core.fleet import Fleet, Member, Phase
from ..core.layout import Layout
from .launch import Launch, Launcher, Running
from .logs import last_lines
from .restarts import RestartBudget

START_S = 900.0
"""A process that is not ready by then is taken for stuck: a disk at 200 MB/s reads 180 GB of weights in that time."""
KILL_S = 5.0
"""How long after its drain time a process may still take to end before it is killed."""
PUBLISH_RETRY_S = 0.5
LIVE_POLL_S = 0.02

_LAYOUT = TypeAdapter(Layout)
_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who watches the cluster start and live: the terminal, the time line, the state file."""

    def started(self, name: str, pid: int | None) -> None: ...

    def progress(self, name: str, what: str) -> None: ...

    def ready(self, name: str, event: dict[str, Any]) -> None: ...

    def lost(self, name: str, reason: str, restart_in: float | None) -> None:
        """A process died; `restart_in` seconds it is started again, never if None."""
        ...


class Publisher(Protocol):
    async def publish(self, fleet: Fleet) -> int:
        """Tell the router; the highest version it knows. Raises `DiptychError` if it cannot be reached."""
        ...

    async def live(self) -> set[str]:
        """Ids of the workers that the router sees alive. Raises `DiptychError` if it cannot be reached."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Post:
    """`phase` None: the router's."""

    launch: Launch
    launcher: Launcher
    phase: Phase | None
    budget: RestartBudget = field(default_factory=RestartBudget)
    running: Running | None = None
    ready: dict[str, Any] | None = None
    given_up: bool = False

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def member(self) -> Member | None:
        """The worker as routers know it; None while there is none."""
        if self.ready is None or self.phase is None:
            return None
        return Member(
            worker_id=self.name,
            address=self.ready["address"],
            phase=self.phase,
            incarnation=int(self.ready["incarnation"]),
            layout=_LAYOUT.validate_python(self.ready["layout"]),
            capacity_tokens=int(self.ready["capacity_tokens"]),
        )


class Supervisor:
    """Runs a cluster from its start to its end; see the module's text.

    `connect(ready)` makes the publisher for a router that has said `ready`.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        *,
        connect: Callable[[dict[str, Any]], Publisher],
        observer: Observer,
        drain_s: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        self._posts = tuple(posts)
        self._router = next(post for post in posts if post.phase is None)
        self._connect = connect
        self._observer = observer
        self._drain_s = drain_s
        self._clock = clock or MonotonicClock()
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        """Set when the cluster begins to end: nothing is started any more."""
        self._version = 0
        self.all_ready = asyncio.Event()
        """Every process is ready and the router knows every worker."""

    async def run(self, stop: asyncio.Event, kill: asyncio.Event) -> None:
        """Start everything and keep it, until `stop` (drain, then end) or `kill` (end at once) is set.

        Raises `DiptychError` when the cluster could not start or cannot go on; by then everything has ended.
        """
        keepers = {asyncio.create_task(self._keep(post), name=post.name): post for post in self._posts}
        publishing = asyncio.create_task(self._publish(), name="publish")
        stopped = asyncio.create_task(stop.wait())
        try:
            await _first(stopped, publishing, *keepers)
        finally:
            self._ended.set()
            stopped.cancel()
            await self._end(keepers, kill)
            publishing.cancel()
            await asyncio.gather(publishing, stopped, *keepers, return_exceptions=True)
        for task in (*keepers, publishing):
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def _keep(self, post: Post) -> None:
        """Fill the post, again and again; returns when the cluster ends or the post is given up."""
        while True:
            reason = await self._fill(post)
            if self._ended.is_set():
                return
            if not self.all_ready.is_set():
                raise reason
            delay = post.budget.delay(self._clock.now())
            _log.warning("%s ended: %s", post.name, reason.message)
            self._observer.lost(post.name, reason.message, delay)
            if delay is None:
                self._give_up(post, reason)
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), delay)
                return

    def _give_up(self, post: Post, reason: DiptychError) -> None:
        post.given_up = True
        if post.phase is None or all(other.given_up for other in self._posts if other.phase is Phase.DECODE):
            raise Unavailable(f"{post.name} died too often; the cluster ends. The last reason: {reason.message}")

    async def _fill(self, post: Post) -> DiptychError:
        """One life of a process at `post`; why it ended."""
        try:
            running = await post.launcher.start(post.launch)
        except DiptychError as error:
            return error
        post.running = running
        if self._ended.is_set():
            running.kill()
        self._observer.started(post.name, running.pid)
        _log.info("%s started, pid %s", post.name, running.pid)
        late = asyncio.get_running_loop().call_later(START_S, running.kill)
        failed: DiptychError | None = None
        try:
            async for event in running.lines():
                failed = self._heard(post, event) or failed
                if post.ready is not None:
                    late.cancel()
            status = await running.wait()
        finally:
            late.cancel()
            post.running = post.ready = None
            self._changed.set()
        _log.info("%s ended with status %s", post.name, status)
        return failed or Unavailable(_epitaph(post, status))

    def _heard(self, post: Post, event: dict[str, Any]) -> DiptychError | None:
        match event["event"]:
            case "progress":
                self._observer.progress(post.name, str(event.get("what", "")))
            case "ready":
                post.ready = event
                self._changed.set()
                _log.info("%s is ready: %s", post.name, event.get("address") or event.get("grpc"))
                self._observer.ready(post.name, event)
            case "failed":
                return _failure(post, str(event.get("message", "no reason given")), event.get("field"))
        return None

    async def _publish(self) -> None:
        """Tell the router of every change of the fleet."""
        publisher: Publisher | None = None
        told: dict[str, Any] | None = None
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                ready = self._router.ready
                if ready is None:
                    continue
                if publisher is None or ready is not told:
                    if publisher:
                        await publisher.close()
                    publisher, told = self._connect(ready), ready
                await self._tell(publisher)
        finally:
            if publisher:
                await publisher.close()

    async def _tell(self, publisher: Publisher) -> None:
        members = tuple(member for post in self._posts if (member := post.member))
        self._version += 1
        try:
            known = await publisher.publish(Fleet(self._version, members))
        except DiptychError as error:
            _log.warning("the router did not take fleet %d: %s", self._version, error.message)
            await asyncio.sleep(PUBLISH_RETRY_S)
            self._changed.set()
            return
        _log.info("fleet %d published: %s", self._version, ", ".join(f"{member.worker_id} {member.incarnation:x}" for member in members))
        if known > self._version:  # a router that outlived an earlier supervisor
            self._version = known
            self._changed.set()
        elif len(members) == len(self._posts) - 1 and not self.all_ready.is_set():
            await self._until_live(publisher, {member.worker_id for member in members})

    async def _until_live(self, publisher: Publisher, workers: set[str]) -> None:
        """The router connects to the workers it was told of within milliseconds, and sends us no event when it has: ask it."""
        while not self._changed.is_set():
            with contextlib.suppress(DiptychError):
                if await publisher.live() >= workers:
                    self.all_ready.set()
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LIVE_POLL_S)

    async def _end(self, keepers: dict[asyncio.Task[None], Post], kill: asyncio.Event) -> None:
        """End all processes: at once if the cluster was not up yet or `kill` is set; else the router first, so that what it has
        accepted can finish, then the workers."""
        killed = asyncio.create_task(kill.wait())
        if not self.all_ready.is_set():
            kill.set()
            for task in (task for task, post in keepers.items() if post.running is None):
                task.cancel()  # its launcher is still starting it; should that succeed after all, the sweep finds it
        groups = ([task for task, post in keepers.items() if post.phase is None], [t for t, post in keepers.items() if post.phase])
        for tasks in groups:
            for task in tasks:
                _signal(keepers[task], kill=kill.is_set())
            await _all_or(tasks, killed, self._drain_s + KILL_S)
            for task in tasks:
                _signal(keepers[task], kill=True)
            if tasks:
                await asyncio.wait(tasks, timeout=KILL_S)
        killed.cancel()
        for task in keepers:  # a launcher that does not answer; the sweep at the end finds its processes
            task.cancel()


def _signal(post: Post, *, kill: bool) -> None:
    if post.running is not None:
        (post.running.kill if kill else post.running.terminate)()


async def _first(*tasks: asyncio.Task[Any]) -> None:
    """Until one raises, or `tasks[0]` (told to stop) or the publishing ends; a keeper that gave its post up is no reason to end."""
    pending = set(tasks)
    while tasks[0] in pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if any(task.exception() for task in done):
            return


async def _all_or(tasks: Sequence[asyncio.Task[None]], killed: asyncio.Task[Any], within_s: float) -> None:
    """Until all of `tasks` are done, or `killed` is, or the time is up."""
    if tasks:
        all_done: Awaitable[Any] = asyncio.wait(tasks)
        waiting = asyncio.ensure_future(all_done)
        await asyncio.wait({waiting, killed}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()


def _failure(post: Post, message: str, key: str | None) -> DiptychError:
    """What a process says of its own failure, with the config key its spec's key came from."""
    if key is None:
        return Unavailable(f"{post.name} could not start: {message}\nIts log: {post.launch.log}")
    if "." not in key:
        key = f"{post.phase.value if post.phase else 'router'}.{key}"
    return ConfigError(f"{key}: {message}", field=key)


def _epitaph(post: Post, status: int | None) -> str:
    how = "ended" if status is None else f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = "".join(f"\n    {line}" for line in last_lines(post.launch.log, 8))
    return f"{post.name} {how}. Its log: {post.launch.log}" + (f", which ends with:{lines}" if lines else "")
