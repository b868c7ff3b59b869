"""Which node of a Ray cluster a worker goes to, and with how many threads. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.config import Placing


@dataclass(frozen=True, slots=True)
class Node:
    """A node as it can be used now. `cpus`, `memory` (bytes): what is free. `workers`: ours there."""

    node_id: str
    address: str
    cpus: float
    memory: float
    workers: int = 0

    def fits(self, threads: int, memory: int) -> bool:
        return self.cpus >= threads and self.memory >= memory

    def with_one_more(self, threads: int, memory: int) -> Node:
        return replace(self, cpus=self.cpus - threads, memory=self.memory - memory, workers=self.workers + 1)


def choose(nodes: Sequence[Node], threads: int, memory: int, placing: Placing) -> Node | None:
    """The node for a worker that needs so much, None if it fits nowhere. Of nodes equally used, the one with most free CPUs."""
    fitting = [node for node in nodes if node.fits(threads, memory)]
    sign = -1 if placing is Placing.PACK else 1
    return min(fitting, key=lambda node: (sign * node.workers, -node.cpus, node.address, node.node_id), default=None)


def fit(nodes: Sequence[Node], wanted: Sequence[tuple[int, int]], placing: Placing) -> list[Node] | None:
    """A node for each of `wanted` (threads, memory), in this order; None if they do not all fit."""
    left = {node.node_id: node for node in nodes}
    chosen = []
    for threads, memory in wanted:
        node = choose(list(left.values()), threads, memory, placing)
        if node is None:
            return None
        chosen.append(node)
        left[node.node_id] = node.with_one_more(threads, memory)
    return chosen


def equal_part(nodes: Sequence[Node], wanted: Sequence[tuple[int | None, int]], placing: Placing) -> int:
    """Threads for each of `wanted` (threads, memory) that names none: the most with which all fit, at least 1."""
    for threads in range(int(max((node.cpus for node in nodes), default=1)), 1, -1):
        if fit(nodes, [(threads if asked is None else asked, memory) for asked, memory in wanted], placing):
            return threads
    return 1


def free_run(size: int, taken: Sequence[range], count: int) -> range | None:
    """`count` neighbouring places of `size` that overlap none of `taken`, the first such; None if there is no room."""
    for start in (0, *sorted(run.stop for run in taken)):
        run = range(start, start + count)
        if run.stop <= size and all(run.stop <= other.start or other.stop <= start for other in taken):
            return run
    return None
