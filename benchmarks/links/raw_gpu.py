"""The links between GPUs without the hinge, as `raw` has them between processes' memory.

cuda_ipc: `Tensor.copy_` from the other process's pool, all pieces asked for before the last is waited for. nccl: send and receive out of
one pool into the other, several posted at a time, by a communicator like production's.
"""

from __future__ import annotations

import time

import torch
from diptych.benchmarks.links.raw import RawLink, move, parts
from diptych.core.layout import Layout
from diptych.core.transfer import ShmEndpoint
from diptych.kv_transfer.geometry import HEADER_BYTES
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.transports.cuda_ipc import DevicePool, attach
from diptych.kv_transfer.transports.nccl import NcclWire
from diptych.kv_transfer.transports.nccl_binding import Nccl
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch says so at run time only


class RawGpuLink:
    """One end, as `raw.RawLink`."""

    def __init__(self, pool: Pool, layout: Layout, rank: int) -> None:
        self._layout, self._device = layout, pool.device
        self._here = pool.whole[HEADER_BYTES:]
        self._peer: DevicePool | None = None
        self._wire = NcclWire(rank, Nccl(pool.device))

    async def map(self, endpoint: ShmEndpoint) -> None:
        self._peer = await attach("P", endpoint, self._layout, self._device, silence_s=10.0)

    def copy(self, piece: int) -> float:
        assert self._peer is not None
        torch.cuda.synchronize(self._device)
        begun = time.perf_counter()
        for target, source in zip(parts(self._here, piece), parts(self._peer.whole[HEADER_BYTES:], piece), strict=True):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - begun

    def join(self, path: str) -> None:
        """Connect to the other end, which joins at the same `path`."""
        self._wire.connect(FileStore(path, 2))

    def send(self, piece: int) -> float:
        return move(parts(self._here, piece), self._wire.send)

    def receive(self, piece: int) -> float:
        return move(parts(self._here, piece), self._wire.receive)

    def close(self) -> None:
        self._wire.give_up()
        self._wire.abort()
        if self._peer is not None:
            self._peer.close()


def raw_link(pool: Pool, layout: Layout, rank: int) -> RawLink | RawGpuLink:
    """Where the pool is."""
    return (RawLink if pool.device.type == "cpu" else RawGpuLink)(pool, layout, rank)
