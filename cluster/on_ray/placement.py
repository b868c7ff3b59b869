"""What the driver process does with Ray: find each process a node, reserve what it needs there, and keep it in an actor."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get

from ...core.errors import ConfigError, DiptychError
from ...core.fleet import Phase
from ..process.child import progress, say
from ..process.identities import to_environment
from ..process.spec import AskedWorker, RaySpec
from .keeper import Keeper
from .nodes import Asked, Wanted
from .room import Place, Room

OBJECT_STORE_BYTES = 80 << 20
"""Ray's least (75 MiB) and a little; nothing is ever put there."""

_log = logging.getLogger(__name__)


class Driver:
    """Carries out the supervisor's orders."""

    def __init__(self, spec: RaySpec) -> None:
        self._spec = spec
        self._environment = spec.environment | (to_environment(spec.internal_tls) if spec.internal_tls else {})
        self._actors: dict[int, Any] = {}
        self._cancelled: set[int] = set()
        self._room: Room | None = None
        self._places: dict[int, Place] = {}
        """By the number of the process that leads the worker."""
        self._relays: set[asyncio.Task[None]] = set()

    def connect(self) -> None:
        """Start or join Ray. Raises `ConfigError` if there is none."""
        try:
            if self._spec.address is None:
                ray.init(
                    num_cpus=self._spec.cores,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(self._spec.directory),
                )
            else:
                environment = {"env_vars": self._spec.environment}  # a local one has it from us already, and starts faster without
                ray.init(address=self._spec.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"The Ray cluster at {self._spec.address} cannot be joined" if self._spec.address else "Ray does not start"
            raise ConfigError(f"{where}: {' '.join(str(error).split())}", field="ray.address") from error
        progress("connected")
        if self._spec.address is not None:
            wanted = [[_wanted(worker) for worker in together] for together in self._spec.wanted]
            self._room = Room(wanted, self._spec.placing, self._spec.wait_s)

    @property
    def address(self) -> str:
        """host:port of the Ray cluster."""
        return str(ray.get_runtime_context().gcs_address)

    @property
    def note(self) -> str | None:
        """What should be known of the Ray cluster; None of one that is our own, or loses nothing with its head."""
        if self._room is None or (kept := _storage()) in (None, "redis", "rocksdb"):
            return None
        return (
            f"This Ray cluster keeps its state in its head's {kept} alone: if the head dies, Ray ends the cluster. With GCS fault "
            "tolerance it goes on (RAY_REDIS_ADDRESS, or RAY_gcs_storage=rocksdb, where the head starts)."
        )

    async def serve(self) -> None:
        """Follow orders until the supervisor's end of stdin closes."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 20)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async for line in reader:
            self._obey(json.loads(line))

    def _obey(self, order: dict[str, Any]) -> None:
        match order["do"]:
            case "start":
                relay = asyncio.create_task(self._start(order))
                self._relays.add(relay)
                relay.add_done_callback(self._relays.discard)
            case "send" if actor := self._actors.get(order["id"]):
                actor.send.remote(order["line"])
            case "terminate" if actor := self._actors.get(order["id"]):
                actor.signal.remote(int(signal.SIGTERM))
            case "kill" if actor := self._actors.get(order["id"]):
                ray.kill(actor)
            case "kill":  # no node has been found for it yet
                self._cancelled.add(order["id"])

    async def _start(self, order: dict[str, Any]) -> None:
        number, leader = order["id"], order["leader"]
        try:
            if self._room is not None and leader == number:
                together = {worker[0]: _wanted(worker) for worker in order["together"]}
                self._places[number] = await self._room.reserve(order["name"], together)
        except DiptychError as error:
            say("refused", id=number, message=error.message, field=error.field)
            return
        place = self._places.get(leader)
        if place is not None:
            place.holders.add(number)
        try:
            if number in self._cancelled or (self._room is not None and place is None):  # its leader has gone
                say("ended", id=number, status=None)
            else:
                await self._hold(order, place)
        finally:
            self._cancelled.discard(number)
            if place is not None:
                place.holders.discard(number)
                if not place.holders:
                    self._places.pop(leader).give_back()

    async def _hold(self, order: dict[str, Any], place: Place | None) -> None:
        """One process, from its start to its end."""
        number, rank, status = order["id"], order["rank"], None
        say("placed", id=number)
        keeper: Any = ray.remote(Keeper)
        if place is None:
            keeper = keeper.options(num_cpus=0, max_concurrency=4, max_restarts=0)
        else:
            where = place.strategy(rank)
            seat, more = place.seats[rank], {"max_concurrency": 4, "max_restarts": 0}
            keeper = keeper.options(num_cpus=seat.threads, num_gpus=seat.gpus, scheduling_strategy=where, **more)
        log, options = (order["log"], None) if place is None else (None, place.options(rank))
        actor: Any = keeper.remote(order["argv"], log, self._environment, options)
        self._actors[number] = actor
        try:
            pid, age = await actor.pid.remote()
            say("pid", id=number, pid=pid, age=round(age, 3))
            status, _ = await asyncio.gather(self._relay(number, actor), _keep_log(actor, Path(order["log"])))
        except ray.exceptions.RayError as error:
            _log.warning("the actor of process %d ended: %s", number, error)
            _note(Path(order["log"]), f"Ray: {error}\n")
            await self._end_with_ray()
        finally:
            del self._actors[number]
            ray.kill(actor)
            say("ended", id=number, status=status)

    async def _relay(self, number: int, actor: Any) -> int | None:
        """Say what the process says; its exit status."""
        status: int | None = None
        async for reference in actor.lines.options(num_returns="streaming").remote():
            line = await reference
            if isinstance(line, int):
                status = line
            elif line:
                say("line", id=number, line=line)
        return status

    async def _end_with_ray(self) -> None:
        """End this process if no node of the Ray cluster lives any more: nothing could be placed, and asking would wait for ever."""
        nodes = await asyncio.to_thread(ray.nodes)
        if not any(node["Alive"] for node in nodes):
            say("failed", message="Ray has died, and the workers with it.")
            os._exit(1)  # what else runs here waits for Ray

    def close(self) -> None:
        """End the actors and, if it was started here, Ray."""
        ray.shutdown()


def _wanted(worker: AskedWorker) -> Wanted[Asked]:
    _, phase, ranks, stages = worker
    return Wanted(Phase(phase), [Asked(*rank) for rank in ranks], stages)


def _storage() -> str | None:
    """Where Ray's head keeps the state of its cluster: `memory`, `redis` or `rocksdb`. It notes that for its statistics alone."""
    kept: bytes | None = _internal_kv_get(b"extra_usage_tag_gcs_storage", namespace=b"usage_stats")
    return kept.decode() if kept else None


async def _keep_log(actor: Any, path: Path) -> None:
    """Append what a process on another node logs to its file here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(ray.exceptions.RayError), path.open("ab", buffering=0) as log:  # whoever relays its stdout says that the actor died
        async for reference in actor.log_lines.options(num_returns="streaming").remote():
            log.write(await reference)


def _note(path: Path, text: str) -> None:
    """Append to a worker's log, which is where whoever asks why it ended is sent; a node without Diptych says so only in Ray's error."""
    with path.open("a") as log:
        log.write(text)
