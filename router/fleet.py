"""The fleet as this router sees it: what the supervisor published last, and one link to each member."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from ..core.commands import Command
from ..core.fleet import Fleet, Member, WorkerReport
from ..core.metrics import Recorder
from ..core.security import TlsFiles
from .link import SILENCE_S, Link, Listener
from .placement import Snapshot

log = logging.getLogger(__name__)


class FleetView:
    """Implements `rpc.router.RouterFace`. Without a supervisor it keeps the last fleet it was told."""

    def __init__(self, recorder: Recorder, *, silence_s: float = SILENCE_S, tls: TlsFiles | None = None) -> None:
        """`tls`: what this router shows to workers, and by what it knows them."""
        self._recorder = recorder
        self._silence_s = silence_s
        self._tls = tls
        self._fleet = Fleet(version=0)
        self._links: dict[str, Link] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = 0
        self.changed = asyncio.Event()
        """Set whenever a worker comes, goes or changes its state; who waits for it clears it."""

    def publish(self, fleet: Fleet) -> int:
        """Take `fleet` if it is newer than what is known; the version known afterwards. A member whose incarnation, address or
        layout changed is another worker: what the old one still did for us is lost."""
        if fleet.version <= self._fleet.version:
            return self._fleet.version
        self._fleet = fleet
        members = {member.worker_id: member for member in fleet.members}
        for worker_id, link in list(self._links.items()):
            if members.get(worker_id) != link.member:
                del self._links[worker_id]
                task = asyncio.create_task(link.close())
                self._closing.add(task)
                task.add_done_callback(partial(self._closed, link.member))
        for worker_id, member in members.items():
            if worker_id not in self._links:
                self._links[worker_id] = Link(member, self._recorder, self.changed.set, silence_s=self._silence_s, tls=self._tls)
        log.info("fleet version %d: %s", fleet.version, ", ".join(sorted(members)) or "nobody")
        return fleet.version

    def _closed(self, member: Member, task: asyncio.Task[None]) -> None:
        """A worker that came back goes on with the numbers it had; those of one that has left are no longer shown."""
        self._closing.discard(task)
        if member.worker_id not in self._links:
            self._recorder.forget(member.worker_id, member.phase.value)

    def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        """The fleet in use, and the latest reports of its live workers."""
        return self._fleet, tuple(link.report for link in self._links.values() if link.report)

    def show(self) -> None:
        """Record what the workers have said of themselves: somebody looks."""
        for link in self._links.values():
            link.show()

    def snapshot(self) -> Snapshot:
        """An immutable picture for one placement."""
        self._turn += 1
        return Snapshot.of((link.candidate() for link in self._links.values()), self._turn)

    def send(self, worker_id: str, command: Command, listener: Listener) -> None:
        """As `Link.send`; a worker that has just left the fleet has told its loss already or will."""
        link = self._links.get(worker_id)
        if link:
            link.send(command, listener)

    async def close(self) -> None:
        """Close all links; every attempt still open is told it is lost."""
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()), *self._closing)
