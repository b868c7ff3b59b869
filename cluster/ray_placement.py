"""What the driver process does with Ray: reserve a placement group, keep one actor per process in it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..core.errors import ConfigError
from .child import progress, say
from .ray_keeper import Keeper
from .spec import RaySpec

OBJECT_STORE_BYTES = 80 << 20
"""Ray's least (75 MiB) and a little; nothing is ever put there."""
PLACEMENT_S = 60.0

_log = logging.getLogger(__name__)


class Driver:
    """Carries out the supervisor's orders."""

    def __init__(self, spec: RaySpec) -> None:
        self._spec = spec
        self._actors: dict[int, Any] = {}
        self._group: Any = None
        self._relays: set[asyncio.Task[None]] = set()

    def connect(self) -> None:
        """Start or join Ray, and reserve what the workers need. Raises `ConfigError` if Ray cannot give it."""
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
        # On one node: the only transport there is so far is shared memory.
        self._group = placement_group([{"CPU": cpus} for cpus in self._spec.bundles], strategy="STRICT_PACK")
        if not self._group.wait(PLACEMENT_S):
            raise ConfigError(
                f"No node of the Ray cluster has {sum(self._spec.bundles):g} CPUs free for the {len(self._spec.bundles)} workers. "
                "Start fewer, give them fewer threads, or free some.",
                field="ray.address",
            )

    @property
    def address(self) -> str:
        """host:port of the Ray cluster."""
        return str(ray.get_runtime_context().gcs_address)

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
            case "terminate" if actor := self._actors.get(order["id"]):
                actor.signal.remote(int(signal.SIGTERM))
            case "kill" if actor := self._actors.get(order["id"]):
                ray.kill(actor)

    async def _start(self, order: dict[str, Any]) -> None:
        number = order["id"]
        where = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=order["bundle"])
        keeper: Any = ray.remote(Keeper)
        keeper = keeper.options(num_cpus=self._spec.bundles[order["bundle"]], scheduling_strategy=where, max_concurrency=3, max_restarts=0)
        actor: Any = keeper.remote(order["argv"], order["log"], self._spec.environment, self._spec.address is None)
        self._actors[number] = actor
        status: int | None = None
        try:
            pid, age = await actor.pid.remote()
            say("pid", id=number, pid=pid, age=round(age, 3))
            async for reference in actor.lines.options(num_returns="streaming").remote():
                line = await reference
                if isinstance(line, int):
                    status = line
                elif line:
                    say("line", id=number, line=line)
        except ray.exceptions.RayError as error:
            _log.warning("the actor of process %d ended: %s", number, error)
            await self._end_with_ray()
        finally:
            del self._actors[number]
            ray.kill(actor)
            say("ended", id=number, status=status)

    async def _end_with_ray(self) -> None:
        """End this process if no node of the Ray cluster lives any more: nothing could be placed, and asking would wait for ever."""
        nodes = await asyncio.to_thread(ray.nodes)
        if not any(node["Alive"] for node in nodes):
            say("failed", message="Ray has died, and the workers with it.")
            os._exit(1)  # what else runs here waits for Ray

    def close(self) -> None:
        """End the actors and, if it was started here, Ray."""
        ray.shutdown()
