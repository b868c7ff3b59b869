"""CUDA IPC between two processes of one host: the destination maps the memory of the source's pool into its own GPU's address space, be it
on the same GPU or on another that it reaches, and copies from it there.

Each layer has an event, which this process opens too. (A Ready comes after the event was recorded, so what is waited for is that store or
a later one, and that comes too: a source waits for its step before it asks its GPU for the next.) The host looks whether it has come, and
only then asks for the copies: of a source that was killed an event may never come. So no copy ever stands behind one, to be made over
blocks that are long another's; and no stream does, since CUDA waits for all streams before it unmaps memory, whosever that is. The epoch
words are in the shared file, in host memory: the source sets one before it tells its GPU to write over the blocks, and it is looked at
here when the copy is known to be done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import torch

from ...core.errors import TransferFailed
from ...core.layout import Layout
from ...core.transfer import ShmEndpoint, Transport
from .. import cuda_runtime, cuda_streams
from ..actions import Copy
from ..crossing import Crossing
from ..device_memory import handles, shared_bytes
from ..geometry import Geometry
from ..memory import tensor_at
from ..pool import Pool
from ..rows import copy_rows, require_fit
from . import one_sided
from .one_sided import PeerFile

STREAMS = cuda_streams.Streams()


class DevicePool:
    """`one_sided.PeerPool`. `whole` is all of it, as bytes on our device. All its methods are called on one thread."""

    def __init__(self, layout: Layout, file: PeerFile, device: torch.device, silence_s: float) -> None:
        """`layout`: the pool's. `device`: ours. `silence_s`: what its source has asked its GPU for comes within so long, or never. Raises
        `RuntimeError` if memory or events cannot be reached from it."""
        geometry = Geometry(layout)
        layers = [layer for group in layout.groups for layer in group.layers]
        memory, *events = handles(memoryview(file.mapped), len(layers))
        with torch.cuda.device(device):
            self._events = {layer: cuda_streams.open_event(device, event) for layer, event in zip(layers, events, strict=True)}
            self._address = cuda_runtime.open_handle(memory)
            self._stream = STREAMS.take(device)
        self._offsets, self._device, self._silence_s = geometry.offsets, device, silence_s
        self._missed: list[Callable[[], bool]] = []
        """Looks at what did not come within `silence_s`; empty when the source has spoken since."""
        self.whole = tensor_at(self._address, geometry.size, device)
        self.file = file

    def stored(self, asked: Sequence[Copy]) -> Callable[[], bool]:
        """A source that was silent is not waited for once more, unless it has spoken since."""
        if any(come() for come in self._missed):
            self._missed = []
        awaited: list[Callable[[], bool]] = [self._events[layer].query for layer in {layer for copy in asked for layer in copy.span.layers}]
        deadline = monotonic() + (0 if self._missed else self._silence_s)

        def all_come() -> bool:
            # Each need be seen once: soon after, with the source's next step, its event stands behind a later store.
            awaited[:] = [come for come in awaited if not come()]
            if awaited and monotonic() >= deadline:
                self._missed = awaited
                raise TransferFailed(f"The source's GPU has not stored what was announced within {self._silence_s:g} s.")
            return not awaited

        return all_come

    def begin(self, into: Pool, asked: Sequence[tuple[Crossing, Copy]]) -> Callable[[], None]:
        """Asks the GPU for the copies; what is returned waits for them, with the thread asleep."""
        fits = []
        with torch.cuda.stream(self._stream):
            for crossing, copy in asked:
                found = crossing.between(copy.span, copy.source_blocks, copy.destination_blocks)
                fits.append(copy_rows(self.whole, self._offsets, into, crossing, copy.span, found))
            done = cuda_streams.mark()

        def wait() -> None:
            done.synchronize()
            with torch.cuda.stream(self._stream):
                for fit in fits:
                    require_fit(fit)

        return wait

    def close(self) -> None:
        with torch.cuda.device(self._device):
            self._stream.synchronize()
            STREAMS.give_back(self._device, self._stream)
            self._events.clear()
            del self.whole
            cuda_runtime.close_handle(self._address)
        self.file.close()


async def attach(worker_id: str, endpoint: ShmEndpoint, layout: Layout, device: torch.device, silence_s: float) -> DevicePool:
    """Map a pool of `worker_id`, whose own layout is `layout`, for `device`; of its GPU nothing takes longer than `silence_s`. Raises
    `TransferFailed` as `one_sided.attach` does, and if CUDA cannot map it."""
    size = shared_bytes(sum(len(group.layers) for group in layout.groups))
    try:
        return await one_sided.attach(
            Transport.CUDA_IPC, worker_id, endpoint, lambda file: DevicePool(layout, file, device, silence_s), size
        )
    except RuntimeError as error:
        raise one_sided.unreachable(Transport.CUDA_IPC, worker_id, error) from error
