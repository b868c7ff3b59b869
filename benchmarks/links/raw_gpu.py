"""The links between GPUs without the hinge, as `raw` has them between processes' memory.

cuda_ipc: `Tensor.copy_` from the other process's pool. nccl: send and receive out of one pool into the other, by a blocking communicator
with NCCL's own settings. Of both all pieces are asked for before the last is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diptych.benchmarks.links.raw import RawLink, parts
from diptych.core.layout import Layout
from diptych.core.transfer import ShmEndpoint
from diptych.kv_transfer.geometry import HEADER_BYTES
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.transports.cuda_ipc import DevicePool, attach
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch says so at run time only

UNIQUE_ID = "nccl"


class RawGpuLink:
    """One end, as `raw.RawLink`."""

    def __init__(self, pool: Pool, layout: Layout, rank: int) -> None:
        self._layout, self._device, self._rank = layout, pool.device, rank
        self._here = pool.whole[HEADER_BYTES:]
        self._peer: DevicePool | None = None
        self._communicator: Any = None

    async def map(self, endpoint: ShmEndpoint) -> None:
        self._peer = await attach("P", endpoint, self._layout, self._device, silence_s=10.0)

    def copy(self, piece: int) -> float:
        assert self._peer is not None
        there = parts(self._peer.whole[HEADER_BYTES:], piece)
        return self._taken(
            lambda: [here.copy_(each, non_blocking=True) for here, each in zip(parts(self._here, piece), there, strict=True)]
        )

    def join(self, path: str) -> None:
        """Connect to the other end, which joins at the same `path`."""
        from nccl import core  # type: ignore[import-not-found,unused-ignore]  # not where there is no GPU

        store = FileStore(path, 2)
        if self._rank == 0:
            store.set(UNIQUE_ID, bytes(core.get_unique_id()).hex())
        unique_id = core.UniqueId.from_bytes(bytes.fromhex(store.get(UNIQUE_ID).decode()))
        self._communicator = core.Communicator.init(2, self._rank, unique_id, core.NCCLConfig(blocking=True))

    def send(self, piece: int) -> float:
        return self._moved(self._communicator.send, piece)

    def receive(self, piece: int) -> float:
        return self._moved(self._communicator.recv, piece)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()
        if self._peer is not None:
            self._peer.close()

    def _moved(self, move: Callable[..., object], piece: int) -> float:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        return self._taken(lambda: [move(part, 1 - self._rank, stream=stream) for part in parts(self._here, piece)])

    def _taken(self, ask: Callable[[], list[Any]]) -> float:
        """Seconds until all is done that it asks of the GPU."""
        torch.cuda.synchronize(self._device)
        begun = time.perf_counter()
        ask()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - begun


def raw_link(pool: Pool, layout: Layout, rank: int) -> RawLink | RawGpuLink:
    """Where the pool is."""
    return (RawLink if pool.device.type == "cpu" else RawGpuLink)(pool, layout, rank)
