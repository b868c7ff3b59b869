"""Room for workers on the nodes of a Ray cluster that was joined: one placement group for each, with a bundle for each of its ranks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray._private.state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...core.config import Placing
from ...core.errors import ConfigError
from ...core.fleet import Phase
from ..process.child import say
from .nodes import ROLES, Asked, Need, Node, choose, equal_part, for_phase, free_run, no_room, role_needed

LOOK_AGAIN_S = 10.0
"""How long Ray has to reserve what was seen free; then the next worker gets a turn, and we look again."""
PIN = 0.001
"""Of the resource `node:<address>` that Ray gives each node, and of a role; 1 there is."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's part of a place. `cores`: which of the node's cores are its own, None for any; of which GPUs its own are Ray tells it."""

    node_id: str
    threads: int
    cores: range | None
    gpus: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """What is reserved for one worker: a bundle, and a seat, for each rank."""

    room: Room
    group: Any
    seats: tuple[Seat, ...]
    holders: set[int] = field(default_factory=set)
    """Whoever uses it; it is given back when the last of them has ended."""

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=rank)

    def options(self, rank: int) -> list[str]:
        """For `on_node`."""
        seat = self.seats[rank]
        cores = ["--cores", f"{seat.cores.start}:{len(seat.cores)}"] if seat.cores else []
        return ["--threads", str(seat.threads), *cores]

    def give_back(self) -> None:
        self.room.places.remove(self)
        remove_placement_group(self.group)


class Room:
    """Knows what our workers have reserved, and asks Ray what is free."""

    def __init__(self, wanted: Sequence[tuple[Phase, Sequence[Asked]]], placing: Placing, wait_s: float) -> None:
        """`wanted`: the ranks of each worker of the start; who names no threads gets an equal part of what there is. `wait_s`: how long a
        worker waits for a node with room: one may be on its way, or its old one not yet known to be dead."""
        self.places: list[Place] = []
        self._placing = placing
        self._wait_s = wait_s
        self._wanted = wanted
        self._each: int | None = None
        self._one_by_one = asyncio.Lock()

    async def reserve(self, name: str, phase: Phase, ranks: Sequence[Asked]) -> Place:
        """A place for the worker `name`; `ConfigError` if there is none within `wait_s`. That it waits is said once."""
        give_up, told = time.monotonic() + self._wait_s, False
        while True:
            async with self._one_by_one:
                nodes = await asyncio.to_thread(self._nodes)
                each = min(self._equal_part(nodes), equal_part(nodes, [(phase, ranks)], self._placing))
                needs = [asked.given(each) for asked in ranks]
                chosen = choose(for_phase(nodes, phase), needs, self._placing)
                if chosen is None and not told:
                    told = _waits(name, no_room(name, phase, needs, nodes), self._wait_s)
                guessed = chosen is None and any(asked.threads is None for asked in ranks)
                if place := await asyncio.to_thread(self._reserve, chosen, needs, role_needed(nodes, phase), guessed):
                    self.places.append(place)
                    return place
            if time.monotonic() > give_up:
                raise _refused(no_room(name, phase, needs, nodes))

    def _equal_part(self, nodes: Sequence[Node]) -> int:
        """Threads for a rank that names none. Settled once there are nodes for each phase; until then, what those have that are there."""
        if self._each is not None:
            return self._each
        here = [(phase, ranks) for phase, ranks in self._wanted if for_phase(nodes, phase)]
        each = equal_part(nodes, here, self._placing)
        if len(here) == len(self._wanted):
            self._each = each
        return each

    def _reserve(self, nodes: Sequence[Node] | None, needs: Sequence[Need], role: str | None, guessed: bool) -> Place | None:
        """Without nodes Ray is asked for any with that role: that is how a cluster that can grow learns that it should. `guessed`: what it
        finds is not kept, for only with the node it is known how many threads a rank gets."""
        pins: list[dict[str, float]] = [{f"node:{node.address}": PIN} for node in nodes] if nodes else [{} for _ in needs]
        roles = {role: PIN} if role else {}
        bundles = [{**_resources(need), **pin, **roles} for need, pin in zip(needs, pins, strict=True)]
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(LOOK_AGAIN_S) or guessed:
            remove_placement_group(group)
            return None
        where = placement_group_table(group)["bundles_to_node_id"]
        return Place(self, group, self._seats([where[rank] for rank in range(len(needs))], needs))

    def _nodes(self) -> list[Node]:
        """The living nodes. What Ray says is free lags behind by up to a second: what we have reserved is subtracted by ourselves."""
        free = _free()
        nodes = []
        for node in _every_node():
            node_id, total = node["NodeID"], node["Resources"]
            if node["Alive"] and node_id in free:
                ours = self._ours(node_id)
                cpus = min(free[node_id].get("CPU", 0.0), total.get("CPU", 0.0) - sum(seat.threads for seat in ours))
                roles = ROLES.intersection(total)
                gpus = min(free[node_id].get("GPU", 0.0), total.get("GPU", 0.0) - sum(seat.gpus for seat in ours))
                nodes.append(Node(node_id, node["NodeManagerAddress"], cpus, free[node_id].get("memory", 0.0), len(ours), roles, gpus))
        return nodes

    def _ours(self, node_id: str) -> list[Seat]:
        return [seat for place in self.places for seat in place.seats if seat.node_id == node_id]

    def _seats(self, where: Sequence[str], needs: Sequence[Need]) -> tuple[Seat, ...]:
        """For ranks with a bundle each on the nodes `where`."""
        cores = {
            node_id: iter(self._cores(node_id, [need.threads for there, need in zip(where, needs, strict=True) if there == node_id]))
            for node_id in where
        }
        return tuple(Seat(node_id, need.threads, next(cores[node_id]), need.gpus) for node_id, need in zip(where, needs, strict=True))

    def _cores(self, node_id: str, threads: Sequence[int]) -> list[range | None]:
        """Cores of their own for new ranks, as places among the node's; None if others compute there too, or its own ranks roam."""
        node = next(node for node in _every_node() if node["NodeID"] == node_id)
        total, ours = node["Resources"].get("CPU", 0.0), self._ours(node_id)
        used = total - _free()[node_id].get("CPU", 0.0)
        if used > sum(threads) + sum(seat.threads for seat in ours) or any(seat.cores is None for seat in ours):
            return [None for _ in threads]
        taken = [seat.cores for seat in ours if seat.cores is not None]
        found: list[range | None] = []
        for count in threads:
            found.append(run := free_run(int(total), taken, count))
            taken += [run] if run else []
        return found


def _resources(need: Need) -> dict[str, float]:
    """As Ray names them; it wants no zero."""
    return {"CPU": need.threads, "memory": need.memory, **({"GPU": need.gpus} if need.gpus else {})}


def _waits(name: str, why: str, wait_s: float) -> bool:
    """Say that a worker waits for a node."""
    what = f"waits up to {wait_s:g} s for a node: {why}"
    _log.info("%s %s", name, what)
    say("waiting", name=name, what=what)
    return True


def _refused(why: str) -> ConfigError:
    return ConfigError(f"{why} Start fewer workers, give them fewer threads or kv_tokens, or add a node.", field="ray.address")


def _every_node() -> list[dict[str, Any]]:
    """Also the dead ones."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _free() -> dict[str, dict[str, float]]:
    """Node id → resource → what is free. Ray's public interface has only the sum over all nodes."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return free
