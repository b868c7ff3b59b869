"""The source's staging slots of one pair: the credits of a two-sided transport. What is announced has a slot; without one it waits.

    free ──take()──▶ filling ──filled()──▶ under way ──empty()──▶ free

Slots are filled in the order they are taken, and what was filled is announced and posted in that order. A piece whose transfer has
ended by then was not announced, so it is not sent: its slot is simply free again.
"""

from __future__ import annotations

from collections import deque

from ..core.layout import Layout
from .coverage import Span
from .geometry import padded

SLOTS_PER_PAIR = 4
"""One being filled, two under way, one being emptied; a fifth has nothing to do."""
SLOT_BYTES = 16 << 20
"""What a piece costs its ends whatever its size, 1 ms of CPU time over gloo and 0.3 ms between GPUs, is to be small beside what its bytes
cost, 12 ms and 0.3 ms. Of 512 MiB over gloo: 0.50 s of CPU time with 4 MiB a slot, 0.42 with 8, 0.39 with 16."""


def slot_bytes(layout: Layout) -> int:
    """How much one slot holds, in whole pages, since the checksum reads whole rows of as much; equal at both ends. Longer where a single
    block of a single layer is."""
    longest = max(layout.block_size * group.token_bytes for group in layout.groups)
    return max(SLOT_BYTES, padded(longest))


def pair_bytes(layout: Layout) -> int:
    """What one end of a pair takes while it stands; in host memory only as much as its longest pieces have used."""
    return SLOTS_PER_PAIR * slot_bytes(layout)


class Staging:
    """Which slot holds what, and whose turn is next. Transfers take turns, a piece each, so that a short prompt need not wait for a
    long one."""

    def __init__(self) -> None:
        self._connected = False
        self._free: list[int] = []
        self._filling: deque[tuple[int, str, Span]] = deque()
        self._under_way: set[int] = set()
        self._turns: dict[str, None] = {}

    def connected(self) -> None:
        """The pair stands: there are slots from now on."""
        self._connected = True
        self._free = list(range(SLOTS_PER_PAIR))

    def want(self, transfer_id: str) -> None:
        """The transfer has something to announce, or soon will; its turn comes."""
        self._turns.setdefault(transfer_id)

    def drop(self, transfer_id: str) -> None:
        """It has nothing to announce (any more)."""
        self._turns.pop(transfer_id, None)

    def next(self) -> str | None:
        """Whose turn it is, if there is a free slot."""
        return next(iter(self._turns), None) if self._free else None

    def take(self, transfer_id: str, span: Span) -> int:
        """A free slot for a piece of the transfer, whose next turn comes after the others'."""
        slot = self._free.pop()
        self._filling.append((slot, transfer_id, span))
        self._turns.pop(transfer_id, None)
        self._turns[transfer_id] = None
        return slot

    def filled(self, slot: int) -> tuple[str, Span]:
        """The slot that was taken first among those filling is full: the transfer and the piece. `ValueError` if that is another."""
        first, transfer_id, span = self._filling.popleft()
        if first != slot:
            raise ValueError(f"slot {slot} was filled before slot {first}")
        self._under_way.add(slot)
        return transfer_id, span

    def filling(self, transfer_id: str) -> bool:
        return any(owner == transfer_id for _, owner, _ in self._filling)

    def empty(self, slot: int) -> None:
        """What was in the slot is sent, or is not going to be."""
        self._under_way.remove(slot)
        self._free.append(slot)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        slots = sorted([*self._free, *(slot for slot, _, _ in self._filling), *self._under_way])
        assert slots == (list(range(SLOTS_PER_PAIR)) if self._connected else []), "a slot is free, filling or under way"
