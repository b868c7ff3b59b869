"""The bytes of a rank's KV pool, in host memory or on its GPU, and the file by which peers on the same host find them (`shared_file`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..core.layout import DType, Layout
from ..core.transfer import ShmEndpoint
from .device_memory import DeviceMemory
from .geometry import Geometry
from .host_memory import HostMemory
from .shared_file import SharedFile

DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16, DType.INT8: torch.int8}
CPU = torch.device("cpu")


class Memory(Protocol):
    """Where a pool's bytes are: `whole` is uint8 `[geometry.size]`."""

    whole: Tensor
    shared: SharedFile

    def stored(self, layer: int) -> None: ...
    def await_stored(self, layer: int) -> None: ...
    def close(self) -> None: ...


class Pool:
    """`caches[g][i]` is `[num_blocks[g], kv_heads, 2, block_size, width]` of layer `layout.groups[g].layers[i]`, zeros at first.

    Use `allocate`. `whole` is all of it as bytes, `address` where that begins in this process or on `device`; `geometry` says what lies
    where.
    """

    def __init__(self, layout: Layout, memory: Memory) -> None:
        self.layout = layout
        self.geometry = Geometry(layout)
        self.device = memory.whole.device
        self.whole = memory.whole
        self.address = self.whole.data_ptr()
        self.memory = memory
        self.listener = memory.shared.listener
        self.caches = _views(layout, self.geometry, memory.whole)
        self._closed = False

    @classmethod
    def allocate(cls, layout: Layout, device: torch.device = CPU) -> Pool:
        """A new pool, on a GPU if `device` is one. Raises `ConfigError` (field `kv_tokens`) if there is not that much memory."""
        size = Geometry(layout).size
        if device.type == "cpu":
            return cls(layout, HostMemory(size))
        return cls(layout, DeviceMemory(size, [layer for group in layout.groups for layer in group.layers], device))

    @property
    def endpoint(self) -> ShmEndpoint:
        """What a peer needs to find this pool; `hand_out` must be called when `listener` is readable."""
        return self.memory.shared.endpoint

    def set_word(self, slot: int, word: int) -> None:
        """Set the epoch word of `slot` (`SharedFile.set_word`)."""
        self.memory.shared.set_word(slot, word)

    def word(self, slot: int) -> int:
        """The epoch word of `slot` (`SharedFile.word`). From any thread."""
        return self.memory.shared.word(slot)

    def hand_out(self, refused: Callable[[], None] = lambda: None) -> None:
        """Give the shared file to one process that has connected, if it is of the same user and knows what `endpoint` says (`door`); else
        call `refused`. On the asyncio thread; does not block."""
        self.memory.shared.hand_out(refused)

    def stored(self, layer: int) -> None:
        """Said by the engine, on the thread and the stream that it computes with, when it has asked for the stores of `layer`'s KV and
        before they are told to `Source.computed`: on a GPU they need not be done yet."""
        self.memory.stored(layer)

    def await_stored(self, layer: int) -> None:
        """What the calling thread asks of its stream from here on is done behind the stores of `layer` that were last `stored`."""
        self.memory.await_stored(layer)

    def close(self) -> None:
        """Give the memory back. Tensors of `caches` held elsewhere stay valid in host memory, and are not to be used on a GPU."""
        if not self._closed:
            self._closed = True
            self.caches.clear()
            del self.whole
            self.memory.close()


def _views(layout: Layout, geometry: Geometry, whole: Tensor) -> list[list[Tensor]]:
    caches: list[list[Tensor]] = []
    for group, blocks in zip(layout.groups, layout.num_blocks, strict=True):
        shape = (blocks, group.kv_heads, 2, layout.block_size, group.width)
        length = blocks * layout.block_size * group.token_bytes
        views = [whole[geometry.offsets[layer] :][:length].view(DTYPES[group.dtype]) for layer in group.layers]
        caches.append([view.view(shape) for view in views])
    return caches
