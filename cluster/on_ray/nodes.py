"""Which nodes of a Ray cluster the ranks of a worker, or of a pair of workers, go to, and with how many threads. Pure.

A node may say which phase it is for, by a custom Ray resource: `diptych-prefill`, `diptych-decode`, or both. One with `diptych-router`
alone gets no workers. Where no node has any of these, every node is for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from ...core.config import Placing
from ...core.fleet import Phase

ROUTER_ROLE = "diptych-router"
"""Of the node that `diptych up`, and with it the router, runs on."""


class Need(NamedTuple):
    """What a rank takes of a node: threads, memory in bytes, and GPUs, of which it may want a part. `accelerator`: of which kind the node's
    devices must be, as Ray calls it; empty: of any."""

    threads: int
    memory: int
    gpus: float = 0.0
    accelerator: str = ""


class Asked(NamedTuple):
    """The same before it is known: no threads ask for an equal part of what there is."""

    threads: int | None
    memory: int
    gpus: float = 0.0
    accelerator: str = ""

    def given(self, threads: int) -> Need:
        """`threads`: if it names none."""
        return Need(self.threads or threads, self.memory, self.gpus, self.accelerator)


T = TypeVar("T", Asked, Need)


class Wanted(NamedTuple, Generic[T]):
    """A worker to be placed: its ranks, and into how many stages they are cut, one after another."""

    phase: Phase
    ranks: Sequence[T]
    stages: int = 1


def given(worker: Wanted[Asked], threads: int) -> Wanted[Need]:
    """`threads`: for each rank that names none."""
    return Wanted(worker.phase, [asked.given(threads) for asked in worker.ranks], worker.stages)


def role(phase: Phase) -> str:
    """The resource that the nodes for workers of this phase have."""
    return f"diptych-{phase.value}"


ROLES = frozenset({ROUTER_ROLE, *map(role, Phase)})


@dataclass(frozen=True, slots=True)
class Node:
    """A node as it can be used now. `cpus`, `memory` (bytes), `gpus`: what is free. `ranks`: ours there. `roles`: of `ROLES`, its own.
    `accelerators`: what Ray calls its devices."""

    node_id: str
    address: str
    cpus: float
    memory: float
    ranks: int = 0
    roles: frozenset[str] = frozenset()
    gpus: float = 0.0
    accelerators: frozenset[str] = frozenset()

    def fits(self, need: Need) -> bool:
        there = not need.accelerator or need.accelerator in self.accelerators
        return there and self.cpus >= need.threads and self.memory >= need.memory and self.gpus >= need.gpus

    def after(self, need: Need) -> Node:
        """What it is when one more rank has taken this."""
        cpus, memory, gpus = self.cpus - need.threads, self.memory - need.memory, self.gpus - need.gpus
        return replace(self, cpus=cpus, memory=memory, gpus=gpus, ranks=self.ranks + 1)

    def room_for(self, needs: Sequence[Need]) -> int:
        """How many of these ranks fit together, from the first on."""
        left = self
        for count, need in enumerate(needs):
            if not left.fits(need):
                return count
            left = left.after(need)
        return len(needs)


def role_needed(nodes: Sequence[Node], phase: Phase) -> str | None:
    """The resource that a node must have for workers of this phase; None where no node has a role."""
    return role(phase) if any(node.roles for node in nodes) else None


def for_phase(nodes: Sequence[Node], phase: Phase) -> list[Node]:
    """Those that workers of this phase may go to."""
    needed = role_needed(nodes, phase)
    return [node for node in nodes if needed is None or needed in node.roles]


def for_all(nodes: Sequence[Node], phases: Iterable[Phase]) -> list[Node]:
    """Those that workers of each of these phases may go to."""
    ours = [{node.node_id for node in for_phase(nodes, phase)} for phase in phases]
    return [node for node in nodes if all(node.node_id in some for some in ours)]


def choose(nodes: Sequence[Node], ranks: Sequence[Need], placing: Placing) -> list[Node] | None:
    """A node for each rank of one worker; None if they do not fit.

    One node for all, if there is, for they speak with each other at every step; else as few as can be, the roomiest first. Among nodes with
    room for equally many `placing` decides, then who has most free CPUs.
    """
    left, chosen = list(nodes), list[Node]()
    while (waiting := ranks[len(chosen) :]) and left:
        best = min(left, key=lambda node: (-node.room_for(waiting), *_order(node, placing)))
        chosen += [best] * best.room_for(waiting)
        left.remove(best)
    return None if waiting else chosen


def _order(node: Node, placing: Placing) -> tuple[float, float, str, str]:
    """Who comes first of nodes with as much room."""
    return (-node.ranks if placing is Placing.PACK else node.ranks, -node.cpus, node.address, node.node_id)


def seat(nodes: Sequence[Node], together: Sequence[Wanted[Need]], placing: Placing) -> list[list[Node]] | None:
    """Nodes for the ranks of one worker, or of both of a pair; None if they do not fit so.

    A pair shares one node. Where none has room for all its ranks both are cut alike at their stages, into as few parts as can be, and
    what is the same part of both shares a node: a layer's KV is then handed over within it where stages are even.
    """
    if len(together) == 1:
        chosen = choose(for_phase(nodes, together[0].phase), together[0].ranks, placing)
        return None if chosen is None else [chosen]
    able = for_all(nodes, [worker.phase for worker in together])
    for parts in range(1, min(worker.stages for worker in together) + 1):
        if not any(worker.stages % parts for worker in together) and (found := _in_parts(able, together, parts, placing)):
            return found
    return None


def _in_parts(nodes: Sequence[Node], together: Sequence[Wanted[Need]], parts: int, placing: Placing) -> list[list[Node]] | None:
    left = {node.node_id: node for node in nodes}
    chosen: list[list[Node]] = [[] for _ in together]
    for part in range(parts):
        shares = [_part(worker.ranks, part, parts) for worker in together]
        needs = [need for share in shares for need in share]
        able = [node for node in left.values() if node.room_for(needs) == len(needs)]
        if not able:
            return None
        best = min(able, key=lambda node: _order(node, placing))
        for places, share in zip(chosen, shares, strict=True):
            places += [best] * len(share)
        left[best.node_id] = _after(best, needs)
    return chosen


def _part(ranks: Sequence[Need], part: int, parts: int) -> Sequence[Need]:
    size = len(ranks) // parts
    return ranks[part * size : (part + 1) * size]


def _after(node: Node, needs: Iterable[Need]) -> Node:
    for need in needs:
        node = node.after(need)
    return node


def fit(nodes: Sequence[Node], units: Sequence[Sequence[Wanted[Need]]], placing: Placing) -> list[list[list[Node]]] | None:
    """Nodes for the ranks of each worker of each unit, a worker or a pair, in this order; None if they do not all fit."""
    left = {node.node_id: node for node in nodes}
    places = []
    for together in units:
        chosen = seat(list(left.values()), together, placing)
        if chosen is None:
            return None
        places.append(chosen)
        for there, worker in zip(chosen, together, strict=True):
            for node, need in zip(there, worker.ranks, strict=True):
                left[node.node_id] = left[node.node_id].after(need)
    return places


def equal_part(nodes: Sequence[Node], units: Sequence[Sequence[Wanted[Asked]]], placing: Placing) -> int:
    """Threads for each rank that names none: the most with which all `units` fit, at least 1."""
    for threads in range(int(max((node.cpus for node in nodes), default=1)), 1, -1):
        if fit(nodes, [[given(worker, threads) for worker in together] for together in units], placing):
            return threads
    return 1


def free_run(size: int, taken: Sequence[range], count: int) -> range | None:
    """`count` neighbouring places of `size` that overlap none of `taken`, the first such; None if there is no room."""
    for start in (0, *sorted(run.stop for run in taken)):
        run = range(start, start + count)
        if run.stop <= size and all(run.stop <= other.start or other.stop <= start for other in taken):
            return run
    return None


def no_room(together: Mapping[str, Wanted[Need]], nodes: Sequence[Node]) -> str:
    """Why a worker, or a pair, finds no place on these nodes: a sentence."""
    phases = [worker.phase for worker in together.values()]
    roles = [needed for phase in phases if (needed := role_needed(nodes, phase))]
    ours = for_all(nodes, phases)
    if roles and not ours:
        return _nobody_for(phases, roles, nodes)
    needs = [need for worker in together.values() for need in worker.ranks]
    if missing := {need.accelerator for need in needs if need.accelerator} - {name for node in ours for name in node.accelerators}:
        return _no_such_device(missing, list(together), ours)
    if len(together) > 1:  # one node is to have room for them all
        threads, memory, gpus = sum(need.threads for need in needs), sum(need.memory for need in needs), sum(need.gpus for need in needs)
        whom = f"{' and '.join(together)}, which are a pair"
    else:
        (threads, memory, gpus, _), (name,) = max(needs), together
        whom = f"each of the {len(needs)} ranks of {name}" if len(needs) > 1 else name
    cpus = f"{threads} CPU" if threads == 1 else f"{threads} CPUs"
    kinds = {need.accelerator for need in needs} - {""}
    able = [node for node in ours if kinds <= node.accelerators]
    free = "; ".join(f"{node.address}: {_amounts(node.cpus, node.memory, node.gpus if gpus else None)}" for node in able)
    which = f" with {' and '.join([*roles, *sorted(kinds)])}" if roles or kinds else ""
    wanted = f"{cpus}, {gpus:g} GPU" if gpus else cpus
    return f"No node of the Ray cluster{which} has {wanted} and {memory / 2**30:.1f} GiB free for {whom} (free are {free or 'none'})."


def _no_such_device(missing: set[str], names: Sequence[str], nodes: Sequence[Node]) -> str:
    there = "; ".join(f"{node.address}: {', '.join(sorted(node.accelerators)) or 'none'}" for node in nodes)
    kinds, whom = " and ".join(sorted(missing)), " and ".join(names)
    return f"No node of the Ray cluster has {kinds} (Ray's accelerator_type) for {whom}; there are {there or 'none'}."


def _nobody_for(phases: Sequence[Phase], roles: Sequence[str], nodes: Sequence[Node]) -> str:
    there = "; ".join(f"{node.address}: {', '.join(sorted(node.roles))}" for node in nodes if node.roles)
    whom = f"{phases[0].value} workers" if len(phases) == 1 else "workers of both phases, as a pair needs"
    start = ", ".join(f'"{needed}": 1' for needed in roles)
    return f"No node of the Ray cluster is for {whom} ({there}). Start one with `ray start --address … --resources '{{{start}}}'`."


def _amounts(cpus: float, memory: float, gpus: float | None) -> str:
    return f"{cpus:g} CPUs, {memory / 2**30:.1f} GiB" + (f", {gpus:g} GPUs" if gpus is not None else "")
