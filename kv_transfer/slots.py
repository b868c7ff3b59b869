"""The staging slots of one end of a pair: where pieces lie packed, on their way. In host memory, or on the GPU that has the pool.

A piece begins with a page's end, which goes with it: its seal, by which its other end knows that it has come whole, that nothing took its
blocks while it was read, and that it is not what was in the slot before.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels.copy_summed import table_sums
from . import cuda_streams
from .coverage import Span
from .crossing import Crossing
from .geometry import PAGE
from .packing import checksum as checksum_of
from .packing import pack, unpack
from .pool import Pool
from .rows import pack_rows, require_fit, unpack_rows
from .staging import SLOTS_PER_PAIR

SEAL_BYTES = 16
"""The seal, twice: NCCL moves 16 bytes at a time what begins at a multiple of 16, and everything else byte by byte."""

STREAMS = cuda_streams.Streams()


class Slots(Protocol):
    """Called on the pair's threads: each returns when what it was asked for is done."""

    def view(self, slot: int, length: int) -> Tensor:
        """What crosses (uint8) of a piece that is `length` bytes long, its seal first."""
        ...

    def fill(self, slot: int, span: Span, blocks: tuple[int, ...]) -> int:
        """Pack `span`, which lies in `blocks` of the pool; its checksum."""
        ...

    def seal(self, slot: int, seal: int) -> None:
        """After `fill`: what goes before the piece."""
        ...

    def empty(self, slot: int, span: Span, blocks: tuple[int, ...], name: int) -> bool:
        """Unpack `span` into `blocks` of the pool: whether its seal is its checksum and its `name` (`packing.name_of`). If it is not, they
        may hold anything. Raises `OverflowError` if it is cast and does not fit."""
        ...

    def close(self) -> None:
        """When none of them is used any more."""
        ...


class HostSlots:
    def __init__(self, pool: Pool, crossing: Crossing, slot_bytes: int) -> None:
        self._pool, self._crossing = pool, crossing
        self._slots = torch.empty(SLOTS_PER_PAIR, PAGE + slot_bytes, dtype=torch.uint8)

    def view(self, slot: int, length: int) -> Tensor:
        return self._slots[slot][PAGE - SEAL_BYTES : PAGE + length]

    def fill(self, slot: int, span: Span, blocks: tuple[int, ...]) -> int:
        return pack(self._pool, self._crossing, span, blocks, self._slots[slot][PAGE:])

    def seal(self, slot: int, seal: int) -> None:
        self._seal(slot).fill_(seal)

    def empty(self, slot: int, span: Span, blocks: tuple[int, ...], name: int) -> bool:
        return unpack(self._pool, self._crossing, span, blocks, self._slots[slot][PAGE:], int(self._seal(slot)[0]) ^ name)

    def close(self) -> None:
        """The memory goes with it."""

    def _seal(self, slot: int) -> Tensor:
        return self._slots[slot][PAGE - SEAL_BYTES : PAGE].view(torch.int64)


class DeviceSlots:
    """On a stream of its own, which waits for the layers it packs; so the engine's never waits. The thread sleeps until it is done.

    A checksum costs two reads of the piece where reading is fastest, and finds what would else go unseen: a piece sent before it was
    packed.
    """

    def __init__(self, pool: Pool, crossing: Crossing, slot_bytes: int) -> None:
        self._pool, self._crossing = pool, crossing
        self._stream = STREAMS.take(pool.device)
        try:
            with torch.cuda.stream(self._stream):
                self._slots = torch.empty(SLOTS_PER_PAIR, PAGE + slot_bytes, dtype=torch.uint8, device=pool.device)
        except RuntimeError:  # there is not so much memory, and another pair will be tried
            STREAMS.give_back(pool.device, self._stream)
            raise

    def view(self, slot: int, length: int) -> Tensor:
        return self._slots[slot][PAGE - SEAL_BYTES : PAGE + length]

    def fill(self, slot: int, span: Span, blocks: tuple[int, ...]) -> int:
        with torch.cuda.stream(self._stream):
            for layer in span.layers:
                self._pool.await_stored(layer)
            pack_rows(self._pool, self._crossing, span, blocks, self._slots[slot][PAGE:])
            found = self._sums(slot, span)
            cuda_streams.mark().synchronize()
        return checksum_of(found)

    def seal(self, slot: int, seal: int) -> None:
        with torch.cuda.stream(self._stream):
            self._seal(slot).fill_(seal)
            cuda_streams.mark().synchronize()

    def empty(self, slot: int, span: Span, blocks: tuple[int, ...], name: int) -> bool:
        with torch.cuda.stream(self._stream):
            found, seal = self._sums(slot, span), cuda_streams.to_host(self._seal(slot))
            fits = unpack_rows(self._pool, self._crossing, span, blocks, self._slots[slot][PAGE:])
            cuda_streams.mark().synchronize()
            if checksum_of(found) != int(seal[0]) ^ name:
                return False
            require_fit(fits)
        return True

    def close(self) -> None:
        self._stream.synchronize()
        del self._slots
        STREAMS.give_back(self._pool.device, self._stream)

    def _seal(self, slot: int) -> Tensor:
        return self._slots[slot][PAGE - SEAL_BYTES : PAGE].view(torch.int64)

    def _sums(self, slot: int, span: Span) -> Tensor:
        return cuda_streams.to_host(table_sums(self._slots[slot][PAGE:], self._crossing.bytes(span)))


def slots_for(pool: Pool, crossing: Crossing, slot_bytes: int) -> Slots:
    """Where `pool` is."""
    return (HostSlots if pool.device.type == "cpu" else DeviceSlots)(pool, crossing, slot_bytes)
