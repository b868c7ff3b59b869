"""Which nodes of a Ray cluster the ranks of a worker go to, and with how many threads. Pure.

A node may say which phase it is for, by a custom Ray resource: `diptych-prefill`, `diptych-decode`, or both. One with `diptych-router`
alone gets no workers. Where no node has any of these, every node is for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...core.config import Placing
from ...core.fleet import Phase

ROUTER_ROLE = "diptych-router"
"""Of the node that `diptych up`, and with it the router, runs on."""


class Need(NamedTuple):
    """What a rank takes of a node: threads, memory in bytes, and GPUs, of which it may want a part."""

    threads: int
    memory: int
    gpus: float = 0.0


class Asked(NamedTuple):
    """The same before it is known: no threads ask for an equal part of what there is."""

    threads: int | None
    memory: int
    gpus: float = 0.0

    def given(self, threads: int) -> Need:
        """`threads`: if it names none."""
        return Need(self.threads or threads, self.memory, self.gpus)


def role(phase: Phase) -> str:
    """The resource that the nodes for workers of this phase have."""
    return f"diptych-{phase.value}"


ROLES = frozenset({ROUTER_ROLE, *map(role, Phase)})


@dataclass(frozen=True, slots=True)
class Node:
    """A node as it can be used now. `cpus`, `memory` (bytes), `gpus`: what is free. `ranks`: ours there. `roles`: of `ROLES`, its own."""

    node_id: str
    address: str
    cpus: float
    memory: float
    ranks: int = 0
    roles: frozenset[str] = frozenset()
    gpus: float = 0.0

    def fits(self, need: Need) -> bool:
        return self.cpus >= need.threads and self.memory >= need.memory and self.gpus >= need.gpus

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


def choose(nodes: Sequence[Node], ranks: Sequence[Need], placing: Placing) -> list[Node] | None:
    """A node for each rank of one worker; None if they do not fit.

    One node for all, if there is, for they speak with each other at every step; else as few as can be, the roomiest first. Among nodes with
    room for equally many `placing` decides, then who has most free CPUs.
    """
    left, chosen = list(nodes), list[Node]()
    sign = -1 if placing is Placing.PACK else 1
    while (waiting := ranks[len(chosen) :]) and left:
        best = min(left, key=lambda node: (-node.room_for(waiting), sign * node.ranks, -node.cpus, node.address, node.node_id))
        chosen += [best] * best.room_for(waiting)
        left.remove(best)
    return None if waiting else chosen


def fit(nodes: Sequence[Node], workers: Sequence[tuple[Phase, Sequence[Need]]], placing: Placing) -> list[list[Node]] | None:
    """Nodes for the ranks of each worker, in this order; None if they do not all fit."""
    left = {node.node_id: node for node in nodes}
    places = []
    for phase, ranks in workers:
        chosen = choose(for_phase(list(left.values()), phase), ranks, placing)
        if chosen is None:
            return None
        places.append(chosen)
        for node, need in zip(chosen, ranks, strict=True):
            left[node.node_id] = left[node.node_id].after(need)
    return places


def equal_part(nodes: Sequence[Node], workers: Sequence[tuple[Phase, Sequence[Asked]]], placing: Placing) -> int:
    """Threads for each rank of `workers` that names none: the most with which all fit, at least 1."""
    for threads in range(int(max((node.cpus for node in nodes), default=1)), 1, -1):
        named = [(phase, [asked.given(threads) for asked in ranks]) for phase, ranks in workers]
        if fit(nodes, named, placing):
            return threads
    return 1


def free_run(size: int, taken: Sequence[range], count: int) -> range | None:
    """`count` neighbouring places of `size` that overlap none of `taken`, the first such; None if there is no room."""
    for start in (0, *sorted(run.stop for run in taken)):
        run = range(start, start + count)
        if run.stop <= size and all(run.stop <= other.start or other.stop <= start for other in taken):
            return run
    return None


def no_room(name: str, phase: Phase, needs: Sequence[Need], nodes: Sequence[Node]) -> str:
    """Why the worker `name` finds no place on these nodes: a sentence."""
    needed, ours = role_needed(nodes, phase), for_phase(nodes, phase)
    if needed and not ours:
        roles = "; ".join(f"{node.address}: {', '.join(sorted(node.roles))}" for node in nodes if node.roles)
        return (
            f"No node of the Ray cluster is for {phase.value} workers ({roles}). Start one with "
            f"`ray start --address … --resources '{{\"{needed}\": 1}}'`."
        )
    threads, memory, gpus = max(needs)
    cpus = f"{threads} CPU" if threads == 1 else f"{threads} CPUs"
    each = f"each of the {len(needs)} ranks of {name}" if len(needs) > 1 else name
    free = "; ".join(f"{node.address}: {_amounts(node.cpus, node.memory, node.gpus if gpus else None)}" for node in ours)
    which = f" with {needed}" if needed else ""
    wanted = f"{cpus}, {gpus:g} GPU" if gpus else cpus
    return f"No node of the Ray cluster{which} has {wanted} and {memory / 2**30:.1f} GiB free for {each} (free are {free or 'none'})."


def _amounts(cpus: float, memory: float, gpus: float | None) -> str:
    return f"{cpus:g} CPUs, {memory / 2**30:.1f} GiB" + (f", {gpus:g} GPUs" if gpus is not None else "")
