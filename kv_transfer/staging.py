"""The credits of one pair of a two-sided transport: how many pieces are announced ahead of what is sent.

A piece is announced before it is read, so that its other end is ready for it, and several at a time. From then on it is sent in its turn,
whatever becomes of its transfer: what was fenced before it was read whole goes with a checksum that is wrong.
"""

from __future__ import annotations

from ..core.layout import Layout
from .geometry import PAGE, padded

SLOTS_PER_PAIR = 4
"""One being filled, two under way, one being emptied; a fifth has nothing to do."""
CREDITS = 2 * SLOTS_PER_PAIR
"""Announced and not sent."""
SENT_TOGETHER = CREDITS // 2
"""A source's leader is told of so many pieces at a time, if as many are still to be sent, and so announces as many at a time: each time
costs both ends' leaders some 2 ms of CPU time over gloo, with the message that it leads to."""
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
    return SLOTS_PER_PAIR * (PAGE + slot_bytes(layout))


class Staging:
    """How many pieces of a pair may be announced, and whose turn is next. Transfers take turns, a piece each, so that a short prompt need
    not wait for a long one."""

    def __init__(self) -> None:
        self._connected = False
        self._credits = 0
        self._turns: dict[str, None] = {}

    def connected(self) -> None:
        """The pair stands: something may be announced from now on."""
        self._connected, self._credits = True, CREDITS

    def want(self, transfer_id: str) -> None:
        """The transfer has something to announce, or soon will; its turn comes."""
        self._turns.setdefault(transfer_id)

    def drop(self, transfer_id: str) -> None:
        """It has nothing to announce (any more)."""
        self._turns.pop(transfer_id, None)

    def next(self) -> str | None:
        """Whose turn it is, if a piece may be announced."""
        return next(iter(self._turns), None) if self._credits else None

    def take(self, transfer_id: str) -> None:
        """A piece of the transfer is announced; its next turn comes after the others'."""
        self._credits -= 1
        del self._turns[transfer_id]
        self._turns[transfer_id] = None

    def sent(self, count: int) -> None:
        """So many pieces are sent."""
        self._credits += count

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert 0 <= self._credits <= (CREDITS if self._connected else 0), "what is announced and not sent has a credit"
