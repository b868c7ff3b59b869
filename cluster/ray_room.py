"""Room for workers on the nodes of a Ray cluster that was joined: one placement group for each, with one bundle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..core.config import Placing
from ..core.errors import ConfigError
from .nodes import Node, choose, equal_part, free_run

PLACEMENT_S = 60.0
"""How long a worker waits for a node with room: one may be on its way, or its old one not yet known to be dead."""
LOOK_AGAIN_S = 10.0
"""How long Ray has to reserve what was seen free; then the next worker gets a turn, and we look again."""
PIN = 0.001
"""Of the resource `node:<address>` that Ray gives each node; 1 there is."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """What is reserved for one worker. `cores`: which of the node's cores are its own, None for any."""

    room: Room
    group: Any
    node_id: str
    threads: int
    cores: range | None

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=0)

    @property
    def options(self) -> list[str]:
        """For `on_node`."""
        cores = ["--cores", f"{self.cores.start}:{len(self.cores)}"] if self.cores else []
        return ["--threads", str(self.threads), *cores]

    def give_back(self) -> None:
        self.room.places.remove(self)
        remove_placement_group(self.group)


class Room:
    """Knows what our workers have reserved, and asks Ray what is free."""

    def __init__(self, wanted: Sequence[tuple[int | None, int]], placing: Placing) -> None:
        """`wanted`: threads (None: an equal part of what there is) and memory in bytes of each worker of the start."""
        self.places: list[Place] = []
        self._placing = placing
        self._each = equal_part(self._nodes(), wanted, placing)
        self._one_by_one = asyncio.Lock()

    async def reserve(self, name: str, threads: int | None, memory: int) -> Place:
        """A place for the worker `name`; `ConfigError` if there is none within `PLACEMENT_S`."""
        give_up = time.monotonic() + PLACEMENT_S
        while True:
            async with self._one_by_one:
                nodes = await asyncio.to_thread(self._nodes)
                count = threads or max(1, min(self._each, int(max((node.cpus for node in nodes), default=1))))
                node = choose(nodes, count, memory, self._placing)
                if place := await asyncio.to_thread(self._reserve, node, count, memory):
                    self.places.append(place)
                    return place
            if time.monotonic() > give_up:
                raise _no_room(name, count, memory, nodes)

    def _reserve(self, node: Node | None, threads: int, memory: int) -> Place | None:
        """Without a node Ray is asked for any: that is how a cluster that can grow learns that it should."""
        pin = {f"node:{node.address}": PIN} if node else {}
        group = placement_group([{"CPU": threads, "memory": memory, **pin}])
        if not group.wait(LOOK_AGAIN_S):
            remove_placement_group(group)
            return None
        (node_id,) = placement_group_table(group)["bundles_to_node_id"].values()
        return Place(self, group, node_id, threads, self._cores(node_id, threads))

    def _nodes(self) -> list[Node]:
        """The living nodes. What Ray says is free lags behind by up to a second: what we have reserved is subtracted by ourselves."""
        free = _free()
        nodes = []
        for node in _every_node():
            node_id, total = node["NodeID"], node["Resources"]
            if node["Alive"] and node_id in free:
                ours = [place for place in self.places if place.node_id == node_id]
                cpus = min(free[node_id].get("CPU", 0.0), total.get("CPU", 0.0) - sum(place.threads for place in ours))
                nodes.append(Node(node_id, node["NodeManagerAddress"], cpus, free[node_id].get("memory", 0.0), len(ours)))
        return nodes

    def _cores(self, node_id: str, threads: int) -> range | None:
        """Cores of the worker's own, as places among the node's; None if others compute there too, or its own workers roam."""
        node = next(node for node in _every_node() if node["NodeID"] == node_id)
        total = node["Resources"].get("CPU", 0.0)
        ours = [place for place in self.places if place.node_id == node_id]
        used = total - _free()[node_id].get("CPU", 0.0)
        if used > threads + sum(place.threads for place in ours) or any(place.cores is None for place in ours):
            return None
        return free_run(int(total), [place.cores for place in ours if place.cores is not None], threads)


def _no_room(name: str, threads: int, memory: int, nodes: Sequence[Node]) -> ConfigError:
    free = "; ".join(f"{node.address}: {node.cpus:g} CPUs, {node.memory / 2**30:.1f} GiB" for node in nodes)
    cpus = f"{threads} CPU" if threads == 1 else f"{threads} CPUs"
    return ConfigError(
        f"No node of the Ray cluster has {cpus} and {memory / 2**30:.1f} GiB free for {name} (free are {free or 'none'}). "
        "Start fewer workers, give them fewer threads or kv_tokens, or add a node.",
        field="ray.address",
    )


def _every_node() -> list[dict[str, Any]]:
    """Also the dead ones."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _free() -> dict[str, dict[str, float]]:
    """Node id → resource → what is free. Ray's public interface has only the sum over all nodes."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return free
