"""The links without the hinge: the same two pools, moved from end to end in pieces of equal size by torch itself.

shm: `Tensor.copy_` from the other process's pool on one thread. gloo: send and receive out of one pool into the other, several posted at a
time, over one connection of production's.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from diptych.core.layout import Layout
from diptych.core.transfer import ShmEndpoint
from diptych.kv_transfer.geometry import Geometry
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.staging import SLOTS_PER_PAIR
from diptych.kv_transfer.transports.gloo import GlooWires
from diptych.kv_transfer.transports.shm import ShmPool, attach
from diptych.kv_transfer.transports.two_sided import Work
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]  # torch says so at run time only

LONGEST_S = 60.0


def whole(layout: Layout, address: int) -> Tensor:
    """Every layer of the pool at `address`, as bytes."""
    geometry = Geometry(layout)
    first = min(geometry.offsets.values())
    return torch.frombuffer((ctypes.c_uint8 * (geometry.size - first)).from_address(address + first), dtype=torch.uint8)


def parts(pool: Tensor, piece: int) -> list[Tensor]:
    """Views of `piece` bytes each."""
    return [pool[start : start + piece] for start in range(0, len(pool), piece)]


def move(pieces: Iterable[Tensor], post: Callable[[Tensor], Work]) -> float:
    """Post a send or a receive for each, as many at a time as production does; the seconds until the last is done."""
    posted: deque[Work] = deque()
    begun = time.perf_counter()
    for piece in pieces:
        if len(posted) == SLOTS_PER_PAIR:
            posted.popleft().wait(timedelta(seconds=LONGEST_S))
        posted.append(post(piece))
    for work in posted:
        work.wait(timedelta(seconds=LONGEST_S))
    return time.perf_counter() - begun


class RawLink:
    """One end; `rank` 0 sends, 1 receives or copies. `piece` is in bytes; every method that moves returns its seconds."""

    def __init__(self, pool: Pool, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._here = whole(layout, pool.address)
        self._peer: ShmPool | None = None
        self._group: Any = None

    async def map(self, endpoint: ShmEndpoint) -> None:
        self._peer = await attach("P", endpoint, self._layout)

    def copy(self, piece: int) -> float:
        assert self._peer is not None
        there = whole(self._layout, self._peer.address)
        begun = time.perf_counter()
        for target, source in zip(parts(self._here, piece), parts(there, piece), strict=True):
            target.copy_(source)
        return time.perf_counter() - begun

    def join(self, path: str) -> None:
        """Connect to the other end, which joins at the same `path`."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices = GlooWires("127.0.0.1").devices()[:1]
        options._timeout = timedelta(seconds=LONGEST_S)
        options._threads = 1
        self._group = ProcessGroupGloo(FileStore(path, 2), self._rank, 2, options)

    def send(self, piece: int) -> float:
        return move(parts(self._here, piece), lambda part: self._group.send([part], 1, 0))

    def receive(self, piece: int) -> float:
        return move(parts(self._here, piece), lambda part: self._group.recv([part], 0, 0))

    def close(self) -> None:
        self._group = None
        if self._peer is not None:
            self._peer.close()
