"""A post: a place in the cluster that one process fills, and what those who fill it and watch it must offer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter

from ...core.errors import ConfigError, DiptychError, Unavailable
from ...core.fleet import Fleet, Member, Phase
from ...core.layout import Layout
from ..process.launcher import Launch, Launcher, Running
from ..process.logs import hand_on, last_lines
from ..process.spec import Worker
from .restarts import RestartBudget

_LAYOUT = TypeAdapter(Layout)


class Observer(Protocol):
    """Who watches the cluster start and live: the terminal, the time line, the state file."""

    def started(self, name: str, pid: int | None, rank: int = 0) -> None: ...

    def progress(self, name: str, what: str) -> None: ...

    def ready(self, name: str, event: dict[str, Any]) -> None: ...

    def lost(self, name: str, reason: str, restart_in: float | None) -> None:
        """A process died; `restart_in` seconds it is started again, never if None."""
        ...

    def left(self, name: str) -> None:
        """A worker was told to leave, and has ended."""
        ...

    def flipped(self, name: str, to: str) -> None:
        """The processes of one worker, if they live, are to be another's from now on."""
        ...


class Publisher(Protocol):
    async def publish(self, fleet: Fleet) -> int:
        """Tell the router; the highest version it knows. Raises `DiptychError` if it cannot be reached."""
        ...

    async def live(self) -> set[str]:
        """Ids of the workers that the router sees alive. Raises `DiptychError` if it cannot be reached."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Post:
    """`worker` None: the router's."""

    launch: Launch
    launcher: Launcher
    worker: Worker | None
    budget: RestartBudget = field(default_factory=RestartBudget)
    running: Running | None = None
    ready: dict[str, Any] | None = None
    given_up: bool = False
    seen: asyncio.Event = field(default_factory=asyncio.Event)
    """The router has seen the worker alive."""
    joining: bool = False
    """It comes to a cluster that serves; if it cannot, that is no reason to end the cluster, nor to try again."""
    leaving: bool = False
    flipping: bool = False
    """It changes its role in place; if it dies it is started again for that role, and is then joining."""
    next: tuple[Worker, Launch] | None = None
    """What the worker is to be in place of what it is."""
    became: asyncio.Event = field(default_factory=asyncio.Event)
    """It is no longer what it was when `next` was set."""
    reason: DiptychError | None = None
    """Why its last process ended."""
    keeper: asyncio.Task[None] | None = None
    """What fills the post again and again."""

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def phase(self) -> Phase | None:
        return self.worker.phase if self.worker else None

    @property
    def member(self) -> Member | None:
        """The worker as routers know it; None while there is none."""
        if self.ready is None or self.worker is None:
            return None
        return Member(
            worker_id=self.name,
            address=self.ready["address"],
            phase=self.worker.phase,
            incarnation=int(self.ready["incarnation"]),
            layout=_LAYOUT.validate_python(self.ready["layout"]),
            capacity_tokens=int(self.ready["capacity_tokens"]),
            partner=self.worker.partner,
        )

    def become(self) -> None:
        """From now on this is the post of the `next` worker, which is not ready yet, whether its process lives or is to be started."""
        assert self.next is not None
        worker, launch = self.next
        for was, will in zip(self.launch.ranks, launch.ranks, strict=True):
            hand_on(was.log, will.log)
        self.worker, self.launch, self.next, self.ready = worker, launch, None, None
        self.seen.clear()
        self.became.set()

    def signal(self, *, kill: bool) -> None:
        """Tell the process to end, if there is one; `kill`: now."""
        if self.running is not None:
            (self.running.kill if kill else self.running.terminate)()

    def failure(self, message: str, key: str | None, rank: int = 0) -> DiptychError:
        """What a process says of its own failure, with the config key its spec's key came from."""
        if key is None:
            launch = self.launch.ranks[rank]
            return Unavailable(f"{launch.name} could not start: {message}\nIts log: {launch.log}")
        if "." not in key:
            key = f"{self.worker.section if self.worker else 'router'}.{key}"
        return ConfigError(f"{key}: {message}", field=key)

    def epitaph(self, status: int | None, rank: int = 0) -> str:
        """How the process (`rank`: of several) ended, and what it said last."""
        launch = self.launch.ranks[rank]
        how = "ended" if status is None else f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        lines = "".join(f"\n    {line}" for line in last_lines(launch.log, 8))
        return f"{launch.name} {how}. Its log: {launch.log}" + (f", which ends with:{lines}" if lines else "")
