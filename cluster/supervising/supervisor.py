"""The supervisor: keeps every process of the cluster running, and tells the router which workers there are.

While the cluster starts, any failure ends it, with the reason. Later a process that dies is started again, after a delay and at most so
often (`RestartBudget`); a worker then is another incarnation. Workers may join and leave a cluster that serves. The cluster ends when
the router, or the last decode worker, cannot be brought back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...core.clock import Clock, MonotonicClock
from ...core.errors import DiptychError, Unavailable
from ...core.fleet import Fleet, Phase
from ..process.launcher import Launch
from ..process.spec import Worker, new_role
from .post import Observer, Post, Publisher
from .together import start

START_S = 900.0
"""A process that is not ready by then is taken for stuck: a disk at 200 MB/s reads 180 GB of weights in that time."""
KILL_S = 5.0
"""How long after its drain time a process may still take to end before it is killed."""
LEAVE_S = 60.0
"""How long a worker that leaves may go on with what it has; then the router takes that elsewhere."""
PUBLISH_RETRY_S = 0.5
LIVE_POLL_S = 0.02

_log = logging.getLogger(__name__)


class Supervisor:
    """Runs a cluster from its start to its end; see the module's text.

    `connect(ready)` makes the publisher for a router that has said `ready`; `drain(address, seconds)` has a worker take nothing new
    and finish, and returns the number of attempts it could not.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        *,
        connect: Callable[[dict[str, Any]], Publisher],
        drain: Callable[[str, float], Awaitable[int]],
        observer: Observer,
        drain_s: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        self._posts = list(posts)
        self._router = next(post for post in posts if post.phase is None)
        self._connect = connect
        self._drain = drain
        self._observer = observer
        self._drain_s = drain_s
        self._clock = clock or MonotonicClock()
        self._changed = asyncio.Event()
        self._broken = asyncio.Event()
        """Set when a keeper has raised: the cluster cannot start, or cannot go on."""
        self._ended = asyncio.Event()
        """Set when the cluster begins to end: nothing is started any more."""
        self._version = 0
        self.all_ready = asyncio.Event()
        """Every process is ready and the router knows every worker."""

    @property
    def workers(self) -> tuple[Post, ...]:
        return tuple(post for post in self._posts if post.phase is not None)

    async def run(self, stop: asyncio.Event, kill: asyncio.Event) -> None:
        """Start everything and keep it, until `stop` (drain, then end) or `kill` (end at once) is set.

        Raises `DiptychError` when the cluster could not start or cannot go on; by then everything has ended.
        """
        keepers = [self._fill_from_now_on(post) for post in self._posts]
        publishing = asyncio.create_task(self._publish(), name="publish")
        waits = [asyncio.create_task(event.wait()) for event in (stop, self._broken)]
        try:
            await asyncio.wait({*waits, publishing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended.set()
            for wait in waits:
                wait.cancel()
            await self._end(kill)
            publishing.cancel()
            keepers = [post.keeper for post in self._posts if post.keeper]
            await asyncio.gather(publishing, *waits, *keepers, return_exceptions=True)
        for task in (*keepers, publishing):
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def join(self, post: Post) -> None:
        """Add a worker to a cluster that serves; returns once the router sees it.

        Raises `DiptychError` saying why it could not; it is then no part of the cluster.
        """
        post.joining = True
        self._posts.append(post)
        self._fill_from_now_on(post)
        await _while_kept(post, post.seen)
        if not post.seen.is_set():
            await self._leave(post, kill=True)
            raise post.reason or Unavailable(f"The router cannot reach {post.name}. Its log: {post.launch.log}")

    async def leave(self, post: Post) -> None:
        """Have a worker finish what it has, and end it. What is not finished within `LEAVE_S` the router takes elsewhere."""
        post.leaving = True
        await self._finish(post)
        await self._leave(post, kill=False)

    async def flip(self, post: Post, worker: Worker, launch: Launch) -> bool:
        """Have a worker that is ready finish what it has, and its processes take the role of `worker`; returns once the router sees that,
        and whether they did: where one has died meanwhile they are started again, as `launch`, as after any death.

        Raises `DiptychError` if it has died before, which changes nothing, or if it could not be started for that role either; it is then
        no part of the cluster.
        """
        if (running := post.running) is None:
            raise post.reason or Unavailable(f"{post.name} has died.")
        post.next, post.flipping = (worker, launch), True
        post.became.clear()
        await self._finish(post)
        if post.running is running:
            running.send(new_role(worker).model_dump_json())
        late = asyncio.get_running_loop().call_later(START_S, running.kill)
        for event in (post.became, post.seen):
            await _while_kept(post, event)
        late.cancel()
        post.flipping = False
        if not post.seen.is_set():
            await self._leave(post, kill=True)
            raise post.reason or Unavailable(f"The router cannot reach {post.name}. Its log: {post.launch.log}")
        return post.running is running

    async def _finish(self, post: Post) -> None:
        """Have a worker take nothing new; returns when it has finished what it had, or `LEAVE_S` later."""
        if member := post.member:
            try:
                unfinished = await self._drain(member.address, LEAVE_S)
                _log.info("%s leaves with %d attempts unfinished", post.name, unfinished)
            except DiptychError as error:
                _log.warning("%s could not be drained: %s", post.name, error.message)

    async def _leave(self, post: Post, *, kill: bool) -> None:
        """Its process ends before the router is told: a router that hears first closes the stream, with the last tokens still on it."""
        post.leaving = True
        assert post.keeper is not None
        if post.running is None:
            post.keeper.cancel()
        for insist in (kill, True):
            post.signal(kill=insist)
            await asyncio.wait({post.keeper}, timeout=self._drain_s + KILL_S)
        self._posts.remove(post)
        self._changed.set()
        self._observer.left(post.name)

    def _fill_from_now_on(self, post: Post) -> asyncio.Task[None]:
        post.keeper = asyncio.create_task(self._keep(post), name=post.name)
        post.keeper.add_done_callback(self._kept)
        return post.keeper

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and keeper.exception():
            self._broken.set()

    async def _keep(self, post: Post) -> None:
        """Fill the post, again and again; returns when the cluster ends or the post is given up."""
        while True:
            reason = post.reason = await self._fill(post)
            if self._ended.is_set() or post.leaving or post.joining:
                return
            if not self.all_ready.is_set():
                raise reason
            delay = post.budget.delay(self._clock.now())
            _log.warning("%s ended: %s", post.name, reason.message)
            post.joining = post.flipping
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
            running = await start(post.launcher, post.launch)
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
            if post.next is not None:
                self._become(post)
            self._changed.set()
        _log.info("%s ended with status %s", post.name, status)
        return failed or Unavailable(post.epitaph(status))

    def _heard(self, post: Post, event: dict[str, Any]) -> DiptychError | None:
        match event["event"]:
            case "progress":
                self._observer.progress(post.name, str(event.get("what", "")))
            case "ready":
                post.ready = event
                self._changed.set()
                _log.info("%s is ready: %s", post.name, event.get("address") or event.get("grpc"))
                self._observer.ready(post.name, event)
            case "left" if post.next is not None:
                self._become(post)
            case "failed":
                return post.failure(str(event.get("message", "no reason given")), event.get("field"), event.get("rank", 0))
            case "started":
                _log.info("%s started its rank %d, pid %s", post.name, event["rank"], event["pid"])
                self._observer.started(post.name, event["pid"], event["rank"])
            case "died":
                return Unavailable(post.epitaph(event["status"], event["rank"]))
        return None

    def _become(self, post: Post) -> None:
        was = post.name
        post.become()
        self._changed.set()
        _log.info("%s has left, and becomes %s", was, post.name)
        self._observer.flipped(was, post.name)

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
        else:
            await self._until_seen(publisher)

    async def _until_seen(self, publisher: Publisher) -> None:
        """The router connects to the workers it was told of within milliseconds, and sends us no event when it has: ask it."""
        while not self._changed.is_set() and (unseen := [post for post in self.workers if post.ready and not post.seen.is_set()]):
            with contextlib.suppress(DiptychError):
                live = await publisher.live()
                for post in unseen:
                    if post.name in live:
                        post.seen.set()
                        post.joining = False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LIVE_POLL_S)
        if all(post.seen.is_set() for post in self.workers if not post.joining):
            self.all_ready.set()

    async def _end(self, kill: asyncio.Event) -> None:
        """End all processes: at once if the cluster was not up yet or `kill` is set; else the router first, so that what it has
        accepted can finish, then the workers."""
        killed = asyncio.create_task(kill.wait())
        if not self.all_ready.is_set():
            kill.set()
            for post in self._posts:
                if post.running is None and post.keeper:
                    post.keeper.cancel()  # its launcher is still starting it; should that succeed after all, the sweep finds it
        for posts in ([self._router], self.workers):
            for post in posts:
                post.signal(kill=kill.is_set())
            keepers = {post.keeper for post in posts if post.keeper}
            await _all_or(keepers, killed, self._drain_s + KILL_S)
            for post in posts:
                post.signal(kill=True)
            await asyncio.wait(keepers, timeout=KILL_S)
        killed.cancel()
        for post in self._posts:  # a launcher that does not answer; the sweep at the end finds its processes
            if post.keeper:
                post.keeper.cancel()


async def _while_kept(post: Post, event: asyncio.Event) -> None:
    """Until `event`, for `START_S`, or until nobody fills the post any more."""
    assert post.keeper is not None
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({post.keeper, waiting}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _all_or(tasks: set[asyncio.Task[None]], killed: asyncio.Task[Any], within_s: float) -> None:
    """Until all of `tasks` are done, or `killed` is, or the time is up."""
    waiting = asyncio.ensure_future(asyncio.wait(tasks))
    await asyncio.wait({waiting, killed}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
