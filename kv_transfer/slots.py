"""The staging slots of one end of a pair: where pieces lie packed, on their way. In host memory, or on the GPU that has the pool."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels.copy_summed import table_sums
from . import cuda_streams
from .coverage import Span
from .crossing import Crossing
from .packing import checksum as checksum_of
from .packing import pack, unpack
from .pool import Pool
from .rows import pack_rows, require_fit, unpack_rows
from .staging import SLOTS_PER_PAIR


class Slots(Protocol):
    """Called on the pair's threads: each returns when what it was asked for is done."""

    def view(self, slot: int, length: int) -> Tensor:
        """The first `length` bytes (uint8) of the slot."""
        ...

    def fill(self, slot: int, span: Span, blocks: tuple[int, ...]) -> int:
        """Pack `span`, which lies in `blocks` of the pool; its checksum."""
        ...

    def empty(self, slot: int, span: Span, blocks: tuple[int, ...], checksum: int) -> bool:
        """Unpack `span` into `blocks` of the pool: whether its checksum is this one. If it is not, they may hold anything. Raises
        `OverflowError` if it is cast and does not fit."""
        ...


class HostSlots:
    def __init__(self, pool: Pool, crossing: Crossing, slot_bytes: int) -> None:
        self._pool, self._crossing = pool, crossing
        self._slots = torch.empty(SLOTS_PER_PAIR, slot_bytes, dtype=torch.uint8)

    def view(self, slot: int, length: int) -> Tensor:
        return self._slots[slot][:length]

    def fill(self, slot: int, span: Span, blocks: tuple[int, ...]) -> int:
        return pack(self._pool, self._crossing, span, blocks, self._slots[slot])

    def empty(self, slot: int, span: Span, blocks: tuple[int, ...], checksum: int) -> bool:
        return unpack(self._pool, self._crossing, span, blocks, self._slots[slot], checksum)


class DeviceSlots:
    """On a stream of its own, which waits for the layers it packs; so the engine's never waits. The thread sleeps until it is done.

    A checksum costs two reads of the piece where reading is fastest, and finds what would else go unseen: a piece sent before it was
    packed.
    """

    def __init__(self, pool: Pool, crossing: Crossing, slot_bytes: int) -> None:
        self._pool, self._crossing = pool, crossing
        self._stream = cuda_streams.new_stream(pool.device)
        with torch.cuda.stream(self._stream):
            self._slots = torch.empty(SLOTS_PER_PAIR, slot_bytes, dtype=torch.uint8, device=pool.device)

    def view(self, slot: int, length: int) -> Tensor:
        return self._slots[slot][:length]

    def fill(self, slot: int, span: Span, blocks: tuple[int, ...]) -> int:
        with torch.cuda.stream(self._stream):
            for layer in span.layers:
                self._pool.await_stored(layer)
            pack_rows(self._pool, self._crossing, span, blocks, self._slots[slot])
            found = self._sums(slot, span)
            cuda_streams.mark().synchronize()
        return checksum_of(found)

    def empty(self, slot: int, span: Span, blocks: tuple[int, ...], checksum: int) -> bool:
        with torch.cuda.stream(self._stream):
            found = self._sums(slot, span)
            fits = unpack_rows(self._pool, self._crossing, span, blocks, self._slots[slot])
            cuda_streams.mark().synchronize()
            if checksum_of(found) != checksum:
                return False
            require_fit(fits)
        return True

    def _sums(self, slot: int, span: Span) -> Tensor:
        return cuda_streams.to_host(table_sums(self._slots[slot], self._crossing.bytes(span)))


def slots_for(pool: Pool, crossing: Crossing, slot_bytes: int) -> Slots:
    """Where `pool` is."""
    return (HostSlots if pool.device.type == "cpu" else DeviceSlots)(pool, crossing, slot_bytes)
