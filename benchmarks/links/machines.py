"""What the hinge's own code costs: both pure machines joined by a list, every layer computed and announced on its own, every copy answered
at once. No byte moves and no process is waited for."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from diptych.benchmarks.links.ends import LEASE_S, TOKENS
from diptych.core.layout import Layout
from diptych.core.transfer import GroupGrant, Hello, Transport
from diptych.kv_transfer.actions import Attach, Copy, Dial, Fence, Send, TellCommitted
from diptych.kv_transfer.destination_machine import DestinationMachine
from diptych.kv_transfer.geometry import SLOTS
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.source_machine import SourceMachine

BLOCK = 16


class Machines:
    """Both machines, and whoever carries out their actions at once."""

    def __init__(self, layout: Layout, endpoint: Any) -> None:
        self.layout = layout
        self.source = SourceMachine(Hello("P", 1, layout, endpoint, (Transport.SHM,)), LEASE_S, SLOTS)
        self.destination = DestinationMachine(Hello("D", 2, layout, endpoint, (Transport.SHM,)), LEASE_S, LEASE_S, SLOTS)
        self.actions: deque[tuple[bool, Any]] = deque()
        self.committed = 0

    def at_source(self, actions: list[Any]) -> None:
        self.actions.extend((True, action) for action in actions)
        self._run()

    def at_destination(self, actions: list[Any]) -> None:
        self.actions.extend((False, action) for action in actions)
        self._run()

    def _run(self) -> None:
        while self.actions:
            at_source, action = self.actions.popleft()
            found = self._source(action) if at_source else self._destination(action)
            self.actions.extend(found)

    def _source(self, action: Any) -> list[tuple[bool, Any]]:
        match action:
            case Send(_, message):
                return [(False, after) for after in self.destination.received(1, message, 0.0)]
            case Fence(transfer_id):
                return [(True, after) for after in self.source.fenced(transfer_id, 0.0)]
            case Dial(lane):
                self.destination.lane_opened(0.0)
                return [(True, after) for after in self.source.dialled(lane, 0.0)]
        return []

    def _destination(self, action: Any) -> list[tuple[bool, Any]]:
        match action:
            case Copy():
                return [(False, after) for after in self.destination.copied(action.transfer_id, action.seq, None, 0.0)]
            case Send(_, message):
                return [(True, after) for after in self.source.received(1, message, 0.0)]
            case Attach(lane):
                return [(False, after) for after in self.destination.attached(lane, 0.0)]
            case TellCommitted():
                self.committed += 1
        return []

    def hand_over(self, transfer_id: str, tokens: int) -> None:
        blocks = tuple(range(-(-tokens // BLOCK)))
        self.at_destination(self.destination.expect(transfer_id, 0.0))
        self.at_source(self.source.offer(transfer_id, "D:1", tokens, 0.0))
        self.at_destination(self.destination.grant(transfer_id, (GroupGrant(0, blocks),), 0.0))
        for layer in self.layout.groups[0].layers:
            self.source.computed(transfer_id, (layer,), 0, tokens, (blocks,))
            self.at_source(self.source.announce(0.0))
        self.at_source(self.source.commit(transfer_id, TOKENS, 0.0))


def machines_alone(layout: Layout, tokens: int, runs: int) -> list[float]:
    """Seconds of each transfer."""
    pool = Pool.allocate(layout)
    machines = Machines(layout, (pool.endpoint,))
    pool.close()
    taken = []
    for run in range(runs):
        begun = time.perf_counter()
        machines.hand_over(str(run), tokens)
        taken.append(time.perf_counter() - begun)
    if machines.committed != runs:
        raise RuntimeError(f"{machines.committed} of {runs} transfers were committed")
    return taken
