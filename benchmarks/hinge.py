"""What does the hinge itself cost? One transfer of a prompt between two workers of one rank each, in one process.

    python -m diptych.benchmarks.hinge [--tokens 1024] [--layers 18] [--runs 200]

`machines`: both pure machines joined by a list, every layer computed and announced on its own, every copy answered at once; no byte moves.
`shm`: the same through both shells over real pools, with the copy thread and a lane inside the process.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from diptych.benchmarks.record import describe, summary, surroundings
from diptych.core.clock import MonotonicClock
from diptych.core.errors import DiptychError
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.request import Token
from diptych.core.transfer import GroupGrant, Hello, LaneMessage, Transport
from diptych.kv_transfer.actions import Attach, Copy, Dial, Fence, Send, TellCommitted
from diptych.kv_transfer.destination import Destination
from diptych.kv_transfer.destination_machine import DestinationMachine
from diptych.kv_transfer.geometry import SLOTS
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.source import Source
from diptych.kv_transfer.source_machine import SourceMachine

BLOCK = 16
LEASE_S = 60.0
TOKENS = (Token(0, 42),)


def layout_of(layers: int, tokens: int) -> Layout:
    """Room for one prompt, in blocks of 16 KiB a layer."""
    group = CacheGroup(CacheKind.FULL, tuple(range(layers)), kv_heads=4, head_dim=64, dtype=DType.BFLOAT16)
    return Layout("model", (group,), BLOCK, (-(-tokens // BLOCK),))


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


class NearLane:
    """One end of a lane inside the process."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[LaneMessage | None] = asyncio.Queue()
        self.other: NearLane = self

    def send(self, message: LaneMessage) -> None:
        self.other.inbox.put_nowait(message)

    def close(self) -> None:
        self.inbox.put_nowait(None)
        self.other.inbox.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[LaneMessage]:
        while (message := await self.inbox.get()) is not None:
            yield message


class Ends:
    """Both ends' events: grants at once, and says when a transfer is over."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        self.blocks = blocks
        self.over = asyncio.Event()
        self.destination: Destination | None = None

    def offered(self, transfer_id: str, prompt_tokens: int) -> None:
        assert self.destination is not None
        self.destination.grant(transfer_id, (GroupGrant(0, self.blocks),))

    def nearly_done(self, transfer_id: str) -> None: ...
    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], kv_bytes: int, seconds: float) -> None: ...
    def granted(self, transfer_id: str) -> None: ...
    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None: ...

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        raise error

    def released(self, transfer_id: str) -> None:
        self.over.set()


async def through_shells(layout: Layout, tokens: int, runs: int) -> list[float]:
    """Seconds of each transfer, from its Offer until the source may free."""
    here, there = Pool.allocate(layout), Pool.allocate(layout)
    blocks = tuple(range(layout.num_blocks[0]))
    ends = Ends(tuple(reversed(blocks)))
    only: dict[str, Any] = {"transports": (Transport.SHM,), "host": "127.0.0.1"}
    destination = ends.destination = Destination("D", 2, there, layout, MonotonicClock(), LEASE_S, LEASE_S, ends, **only)
    serving: list[asyncio.Task[None]] = []

    async def dial(_: str) -> NearLane:
        near, far = NearLane(), NearLane()
        near.other, far.other = far, near
        serving.append(asyncio.create_task(destination.serve_lane(far)))
        return near

    source = Source("P", 1, here, layout, MonotonicClock(), LEASE_S, ends, dial=dial, **only)
    taken = []
    for run in range(runs):
        name = str(run)
        ends.over.clear()
        destination.expect(name)
        begun = time.perf_counter()
        source.offer(name, "D:1", tokens)
        for layer in layout.groups[0].layers:
            source.computed(name, (layer,), 0, tokens, (blocks,))
            await asyncio.sleep(0)
        source.commit(name, TOKENS)
        await ends.over.wait()
        taken.append(time.perf_counter() - begun)
    await source.close()
    await destination.close()
    await asyncio.wait(serving)
    here.close()
    there.close()
    return taken


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.hinge", description="What does the hinge itself cost?")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20, help="transfers not counted")
    options = parser.parse_args()
    print(describe(surroundings()))
    layout, runs = layout_of(options.layers, options.tokens), options.warm_up + options.runs
    found = {"machines": machines_alone(layout, options.tokens, runs), "shm": asyncio.run(through_shells(layout, options.tokens, runs))}
    for name, taken in found.items():
        figures = summary(taken[options.warm_up :])
        print(f"{name:10}{figures['p50_ms'] * 1000:9.0f} µs p50{min(taken) * 1e6:9.0f} µs min")


if __name__ == "__main__":
    main()
