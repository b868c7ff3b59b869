"""A launcher that places processes with Ray, through a driver process of its own (`driver.py`). Imports no Ray itself."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.config import LogFormat, Placing
from ...core.errors import ConfigError, DiptychError, Unavailable
from ...core.security import TlsFiles
from ..process import processes
from ..process.launcher import Launch, PlainLauncher, PlainProcess, Running, parse_line
from ..process.spec import AskedWorker, LogLevel, RaySpec
from ..supervising.post import Observer

DRIVER = "ray"
CLOSE_S = 10.0
STARTED_S = 60.0
"""How long Ray may take to start an actor on the node it is to run on."""


def ray_environment(environment: Mapping[str, str], *, local: bool) -> dict[str, str]:
    """Environment for the driver. A local Ray gets a token of its own, reports nothing to anybody and starts no spare worker (a
    start is 2.5 s faster without, measured with Ray 2.60)."""
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0", "RAY_AUTH_MODE": "token"}
    return {**ours, "RAY_AUTH_TOKEN": secrets.token_hex(32), **environment} if local else dict(environment)


def _asked(worker: Launch) -> AskedWorker:
    assert worker.phase is not None
    return (
        worker.name,
        worker.phase,
        tuple((rank.threads, rank.memory, rank.gpus, rank.accelerator) for rank in worker.ranks),
        worker.stages,
    )


@dataclass(slots=True)
class RayProcess:
    """A process held by an actor."""

    number: int
    driver: RayLauncher
    pid: int | None = None
    events: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue)
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    known: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    status: int | None = None
    refused: DiptychError | None = None

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        while (event := await self.events.get()) is not None:
            yield event

    async def wait(self) -> int | None:
        await self.ended.wait()
        return self.status

    def send(self, line: str) -> None:
        self.driver.order("send", self.number, line=line)

    def terminate(self) -> None:
        self.driver.order("terminate", self.number)

    def kill(self) -> None:
        self.driver.order("kill", self.number)

    def end(self, status: int | None) -> None:
        self.status = status
        self.events.put_nowait(None)
        self.placed.set()
        self.known.set()
        self.ended.set()


class RayLauncher:
    """Starts the driver at once; `start` waits until it is connected and the process has a node."""

    def __init__(
        self,
        plain: PlainLauncher,
        *,
        address: str | None,
        cores: int,
        wanted: Sequence[Launch],
        placing: Placing,
        wait_s: float,
        log: Path,
        log_level: LogLevel,
        log_format: LogFormat,
        observer: Observer,
        internal_tls: TlsFiles | None = None,
    ) -> None:
        """`cores`: for a local Ray. For one that is joined: `wanted`, the workers of the start; `wait_s`, how long a worker waits for a
        node; `internal_tls`, to be sent to the nodes."""
        self._observer = observer
        self._log = log
        self._count = 0
        self._processes: dict[int, RayProcess] = {}
        self._running: PlainProcess | None = None
        spec = RaySpec(
            address=address,
            directory=plain.directory / "ray",
            cores=cores,
            wanted=tuple(dict.fromkeys(tuple(map(_asked, launch.together)) for launch in wanted)),
            placing=placing,
            wait_s=wait_s,
            environment={processes.MARK: plain.cluster_id, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
            log_level=log_level,
            internal_tls=internal_tls,
            log_format=log_format,
        )
        argv = (sys.executable, "-m", "diptych.cluster.on_ray.driver", "--spec", spec.model_dump_json())
        own = PlainLauncher(plain.cluster_id, plain.directory, ray_environment(os.environ, local=address is None))
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._driving = asyncio.create_task(self._drive(own, Launch(DRIVER, argv, log)))

    async def start(self, launch: Launch, leader: Running | None = None) -> RayProcess:
        """A leader is placed with all ranks of its worker. Raises `ConfigError` or `Unavailable` if Ray could not be had, or is gone."""
        await asyncio.shield(self._connected)
        process = RayProcess(self._count, self)
        self._count += 1
        self._processes[process.number] = process
        self.order(
            "start",
            process.number,
            name=launch.name,
            argv=launch.argv,
            log=str(launch.log),
            rank=launch.rank,
            leader=leader.number if isinstance(leader, RayProcess) else process.number,
            together=[_asked(worker) for worker in launch.together],
        )
        try:
            await process.placed.wait()  # or refused: the driver looks for a node for `wait_s`
            async with asyncio.timeout(STARTED_S):
                await process.known.wait()
        except TimeoutError:
            process.kill()
            raise Unavailable(f"Ray has not started {launch.name} within {STARTED_S:g} s. Its driver's log: {self._log}") from None
        except asyncio.CancelledError:  # it is no longer wanted
            process.kill()
            raise
        if process.refused:
            raise process.refused
        return process

    def order(self, what: str, number: int, **more: Any) -> None:
        """Tell the driver; one that is gone has ended everything already."""
        if self._running is not None:
            self._running.send(json.dumps({"do": what, "id": number, **more}))

    async def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        if self._running is not None:
            if self._connected.done():
                self._running.hang_up()
            else:
                self._running.kill()  # it hears nothing while Ray starts; the sweep finds what that had started
            await asyncio.wait({self._driving}, timeout=CLOSE_S)
        self._driving.cancel()
        await asyncio.gather(self._driving, return_exceptions=True)
        if self._connected.done() and not self._connected.cancelled():
            self._connected.exception()

    async def _drive(self, launcher: PlainLauncher, launch: Launch) -> None:
        self._running = running = await launcher.start(launch)
        self._observer.started(DRIVER, running.pid)
        failure: DiptychError | None = None
        try:
            async for event in running.lines():
                failure = self._heard(event) or failure
        finally:
            status = await running.wait()
            self._running = None
            gone = failure or Unavailable(f"Ray's driver ended with status {status}. Its log: {self._log}")
            if self._connected.done():
                self._connected = asyncio.get_running_loop().create_future()
            self._connected.set_exception(gone)
            for process in list(self._processes.values()):
                process.end(None)

    def _heard(self, event: dict[str, Any]) -> DiptychError | None:
        match event["event"]:
            case "progress":
                self._observer.progress(DRIVER, event["what"])
            case "ready":
                self._observer.ready(DRIVER, event)
                self._connected.set_result(None)
            case "failed":
                if self._connected.done():
                    return Unavailable(event["message"])
                return ConfigError(event["message"], field=event.get("field"))
            case "waiting":
                self._observer.progress(event["name"], event["what"])
            case "placed":
                self._processes[event["id"]].placed.set()
            case "pid":
                process = self._processes[event["id"]]
                process.pid = event["pid"]
                process.known.set()
            case "line" if (line := parse_line(event["line"])) is not None:
                self._processes[event["id"]].events.put_nowait(line)
            case "refused":
                process = self._processes.pop(event["id"])
                process.refused = ConfigError(event["message"], field=event["field"])
                process.end(None)
            case "ended":
                self._processes.pop(event["id"]).end(event["status"])
        return None
