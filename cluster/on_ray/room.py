"""Room for workers on the nodes of a Ray cluster that was joined: one placement group for each, or for both of a pair, with a bundle for
each rank."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
import ray._private.state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...core.config import Placing
from ...core.errors import ConfigError
from ..process.child import say
from .nodes import ROLES, Asked, Need, Node, Wanted, equal_part, for_all, free_run, given, no_room, role_needed, seat

LOOK_AGAIN_S = 10.0
"""How long Ray has to reserve what was seen free; then the next worker gets a turn, and we look again."""
ACCELERATOR = "accelerator_type:"
"""How Ray's resource for the kind of a node's devices begins; 1 there is on each of its nodes, however many devices it has."""
PIN = 0.001
"""Of the resource `node:<address>` that Ray gives each node, of a role, and of the kind of its devices; 1 there is."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's part of a place. `cores`: which of the node's cores are its own, None for any; of which GPUs its own are Ray tells it."""

    node_id: str
    threads: int
    cores: range | None
    gpus: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """A placement group: a bundle, and a seat, for each rank of those who share it, by name; a worker, or both of a pair. While one of a
    pair has its place the other's is kept for it: it may have died, or not have come yet. `in_use`: whose are taken."""

    group: Any
    seats: Mapping[str, tuple[Seat, ...]]
    in_use: set[str] = field(default_factory=set)

    @property
    def node_ids(self) -> set[str]:
        return {seat.node_id for seats in self.seats.values() for seat in seats}

    def first_bundle(self, name: str) -> int:
        before = list(self.seats)[: list(self.seats).index(name)]
        return sum(len(self.seats[other]) for other in before)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One worker's part of what is reserved."""

    room: Room
    reserved: Reserved
    name: str
    holders: set[int] = field(default_factory=set)
    """Whoever uses it; it is given back when the last of them has ended."""

    @property
    def seats(self) -> tuple[Seat, ...]:
        """By rank."""
        return self.reserved.seats[self.name]

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        bundle = self.reserved.first_bundle(self.name) + rank
        return PlacementGroupSchedulingStrategy(placement_group=self.reserved.group, placement_group_bundle_index=bundle)

    def options(self, rank: int) -> list[str]:
        """For `on_node`."""
        seat = self.seats[rank]
        cores = ["--cores", f"{seat.cores.start}:{len(seat.cores)}"] if seat.cores else []
        return ["--threads", str(seat.threads), *cores]

    def give_back(self) -> None:
        self.reserved.in_use.remove(self.name)
        if not self.reserved.in_use:
            self.room.reserved.remove(self.reserved)
            remove_placement_group(self.reserved.group)


class Room:
    """Knows what our workers have reserved, and asks Ray what is free."""

    def __init__(self, wanted: Sequence[Sequence[Wanted[Asked]]], placing: Placing, wait_s: float) -> None:
        """`wanted`: the workers of the start, those of a pair together; who names no threads gets an equal part of what there is.
        `wait_s`: how long a worker waits for a node with room: one may be on its way, or its old one not yet known to be dead."""
        self.reserved: list[Reserved] = []
        self._placing = placing
        self._wait_s = wait_s
        self._wanted = wanted
        self._each: int | None = None
        self._one_by_one = asyncio.Lock()

    async def reserve(self, name: str, together: Mapping[str, Wanted[Asked]]) -> Place:
        """A place for the worker `name`, and with it for who shares its node, by their names; `ConfigError` if there is none within
        `wait_s`. That it waits is said once."""
        give_up, told = time.monotonic() + self._wait_s, False
        while True:
            async with self._one_by_one:
                if kept := await asyncio.to_thread(self._kept, name):
                    return self._take(kept, name)
                nodes = await asyncio.to_thread(self._nodes)
                each = min(self._equal_part(nodes), equal_part(nodes, [list(together.values())], self._placing))
                workers = {who: given(asked, each) for who, asked in together.items()}
                chosen = seat(nodes, list(workers.values()), self._placing)
                if chosen is None and not told:
                    told = _waits(name, no_room(workers, nodes), self._wait_s)
                guessed = chosen is None and any(asked.threads is None for worker in together.values() for asked in worker.ranks)
                if reserved := await asyncio.to_thread(self._reserve, chosen, workers, nodes, guessed):
                    self.reserved.append(reserved)
                    return self._take(reserved, name)
            if time.monotonic() > give_up:
                raise _refused(no_room(workers, nodes))

    def _take(self, reserved: Reserved, name: str) -> Place:
        reserved.in_use.add(name)
        return Place(self, reserved, name)

    def _kept(self, name: str) -> Reserved | None:
        """What was reserved for it with its partner, if the nodes live. Those of a node that has died are given back as its workers end."""
        mine = [reserved for reserved in self.reserved if name in reserved.seats and name not in reserved.in_use]
        alive = {node["NodeID"] for node in _every_node() if node["Alive"]} if mine else set()
        return next((reserved for reserved in mine if reserved.node_ids <= alive), None)

    def _equal_part(self, nodes: Sequence[Node]) -> int:
        """Threads for a rank that names none. Settled once there are nodes for each phase; until then, what those have that are there."""
        if self._each is not None:
            return self._each
        here = [together for together in self._wanted if for_all(nodes, [worker.phase for worker in together])]
        each = equal_part(nodes, here, self._placing)
        if len(here) == len(self._wanted):
            self._each = each
        return each

    def _reserve(
        self, chosen: Sequence[Sequence[Node]] | None, workers: Mapping[str, Wanted[Need]], nodes: Sequence[Node], guessed: bool
    ) -> Reserved | None:
        """Where none of the `nodes` is chosen Ray is asked for any with the roles, for one if it is a pair: that is how a cluster that can
        grow learns that it should. `guessed`: what it finds is not kept: only with the node it is known how many threads a rank gets."""
        needs = [need for worker in workers.values() for need in worker.ranks]
        roles = [role_needed(nodes, worker.phase) for worker in workers.values() for _ in worker.ranks]
        pins = [f"node:{node.address}" for there in chosen for node in there] if chosen else [None for _ in needs]
        bundles = [{**_resources(need), **dict.fromkeys(filter(None, also), PIN)} for need, *also in zip(needs, roles, pins, strict=True)]
        group = placement_group(bundles, strategy="STRICT_PACK" if chosen is None and len(workers) > 1 else "PACK")
        if not group.wait(LOOK_AGAIN_S) or guessed:
            remove_placement_group(group)
            return None
        where = placement_group_table(group)["bundles_to_node_id"]
        seats = iter(self._seats([where[rank] for rank in range(len(needs))], needs))
        return Reserved(group, {name: tuple(islice(seats, len(worker.ranks))) for name, worker in workers.items()})

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
                kinds = frozenset(name.removeprefix(ACCELERATOR) for name in total if name.startswith(ACCELERATOR))
                address, memory = node["NodeManagerAddress"], free[node_id].get("memory", 0.0)
                nodes.append(Node(node_id, address, cpus, memory, len(ours), roles, gpus, kinds))
        return nodes

    def _ours(self, node_id: str) -> list[Seat]:
        return [seat for reserved in self.reserved for seats in reserved.seats.values() for seat in seats if seat.node_id == node_id]

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
    kind = {ACCELERATOR + need.accelerator: PIN} if need.accelerator else {}
    return {"CPU": need.threads, "memory": need.memory, **({"GPU": need.gpus} if need.gpus else {}), **kind}


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
