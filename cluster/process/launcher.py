"""The seam between the supervisor and whatever starts processes: plain children here, Ray actors in `on_ray/launcher.py`.

Both start the very same command and relay the same lines; the supervisor does not know which it uses.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...core.fleet import Phase
from . import processes

LINE_BYTES = 1 << 20
"""Longest line a process may write to stdout; a ready line with the layout of a 100-layer model has 2 kB."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start. `argv` is the whole command; `log` receives its stderr. What it needs of a node of a Ray cluster: that it is for
    its `phase` (None: no worker's process), `threads` CPUs (None: what there is), `memory` bytes, `gpus`, and that its devices are of the
    kind `accelerator` (empty: any). A worker of many ranks is its leader, rank 0, with the others as `followers`, in `stages` stages;
    `partner`: the worker with which it is a pair."""

    name: str
    argv: tuple[str, ...]
    log: Path
    phase: Phase | None = None
    threads: int | None = None
    memory: int = 0
    gpus: float = 0.0
    accelerator: str = ""
    rank: int = 0
    followers: tuple[Launch, ...] = ()
    stages: int = 1
    partner: Launch | None = None

    @property
    def together(self) -> tuple[Launch, ...]:
        """The worker, or both of its pair, prefill first."""
        both = (self,) if self.partner is None else (self, self.partner)
        return tuple(sorted(both, key=lambda launch: launch.phase is Phase.DECODE))

    @property
    def ranks(self) -> tuple[Launch, ...]:
        """All processes of a worker, by rank."""
        return (self, *self.followers)


class Running(Protocol):
    """A started process."""

    @property
    def pid(self) -> int | None:
        """Its process id, None if it is not known (it runs elsewhere and has not said it)."""
        ...

    def lines(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects it writes to stdout, until it ends. To be iterated once."""
        ...

    async def wait(self) -> int | None:
        """Wait for its end; the exit status, negative for a signal, None if it is not known."""
        ...

    def send(self, line: str) -> None:
        """Write a line to its stdin (a worker's: to its leader's); one that has ended hears nothing."""
        ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    async def start(self, launch: Launch, leader: Running | None = None) -> Running:
        """Start this one process (`together.start` does all of a worker); for a follower `leader` is what was started for its rank 0."""
        ...

    async def close(self) -> None:
        """End what the launcher itself has started; everything launched has ended before."""
        ...


@dataclass(slots=True)
class PlainProcess:
    """A child of the supervisor. Its stdin is the leash: the child ends when the supervisor's end closes."""

    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int | None:
        return self.process.pid

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if (event := parse_line(line)) is not None:
                yield event

    async def wait(self) -> int | None:
        return await self.process.wait()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(line.encode() + b"\n")

    def hang_up(self) -> None:
        """Close its stdin: it ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """The event on a line of stdout; None for anything else a library may have printed there."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def child_environment(cluster_id: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of everything a cluster starts: marked, and with no directory of ours put before others' packages."""
    return {**environment, processes.MARK: cluster_id, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(slots=True)
class PlainLauncher:
    """Starts children on this host, in sessions of their own so that Ctrl-C reaches the supervisor alone."""

    cluster_id: str
    directory: Path
    """Where they run: the scratch directory, never the caller's."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    async def start(self, launch: Launch, leader: Running | None = None) -> PlainProcess:
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *launch.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=self.directory,
                env=child_environment(self.cluster_id, self.environment),
                start_new_session=True,
                limit=LINE_BYTES,
            )
        return PlainProcess(process)

    async def close(self) -> None:
        return None
