"""How much of a prefill worker's pool each attempt may use, from its start until nothing reads its KV any more."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add, le, sub

RECENT = 64
"""Of so many last prompts two destinations count. More than may pass one that waits (16), so that nobody who waits is forgotten; few
enough that a destination which has gone, or come back by a new address, costs half of the pool for no longer than that."""


@dataclass(slots=True)
class Lease:
    """`blocks`: what the attempt fills of each group, as its destination's share. `charge`: what of it must be kept free or in its
    hands (window groups, whose blocks come and go; a full group's blocks are all taken at the start, so its charge is 0).
    `waits_for`: the destination that has not granted yet."""

    blocks: tuple[int, ...]
    charge: tuple[int, ...]
    waits_for: str | None


class Leases:
    """Two bounds. The charges of all attempts fit the pool, so whoever has started gets every block it needs without waiting for
    another attempt. And KV that one destination has not granted fills at most half of the pool, that others be served while it waits;
    all of it if none of the last `RECENT` prompts was for another: one alone may not be kept waiting for nobody."""

    def __init__(self, num_blocks: tuple[int, ...]) -> None:
        self._num_blocks = num_blocks
        self._latest: str | None = None
        self._alike = RECENT
        """How many of the last prompts, without one for another between them, were for `_latest`; `RECENT` if it is the first ever."""
        self._leases: dict[str, Lease] = {}
        self._charged = (0,) * len(num_blocks)
        self._ungranted: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def ungranted(self) -> int:
        """Attempts that wait for their destination's grant."""
        return sum(lease.waits_for is not None for lease in self._leases.values())

    def waits(self, attempt_id: str) -> bool:
        """Whether this attempt waits for its destination's grant. False for unknown ids."""
        lease = self._leases.get(attempt_id)
        return lease is not None and lease.waits_for is not None

    def fits(self, charge: tuple[int, ...]) -> bool:
        """Whether the pool can promise `charge` blocks more."""
        return all(map(le, _sum(self._charged, charge), self._num_blocks))

    def expect(self, destination: str | None) -> None:
        """A prompt has come for it."""
        if destination is None:
            return
        if destination == self._latest:
            self._alike += 1
        elif self._latest is not None:
            self._alike = 1
        self._latest = destination

    def within_share(self, destination: str | None, blocks: tuple[int, ...]) -> bool:
        """Whether `destination` may be sent `blocks` more before it grants. One prompt alone may be larger than the share: it
        could never start otherwise."""
        waiting = self._ungranted.get(destination) if destination is not None and self._alike < RECENT else None
        return waiting is None or all(2 * (a + b) <= count for a, b, count in zip(waiting, blocks, self._num_blocks, strict=True))

    def begin(self, attempt_id: str, lease: Lease) -> None:
        self._leases[attempt_id] = lease
        self._charged = _sum(self._charged, lease.charge)
        if lease.waits_for is not None:
            none = (0,) * len(lease.blocks)
            self._ungranted[lease.waits_for] = _sum(self._ungranted.get(lease.waits_for, none), lease.blocks)

    def granted(self, attempt_id: str) -> None:
        """Its destination has granted (or the attempt ends). Unknown ids are ignored."""
        lease = self._leases.get(attempt_id)
        if lease is None or lease.waits_for is None:
            return
        left = _difference(self._ungranted.pop(lease.waits_for), lease.blocks)
        if any(other.waits_for == lease.waits_for for other in self._leases.values() if other is not lease):
            self._ungranted[lease.waits_for] = left
        lease.waits_for = None

    def shrink(self, attempt_id: str, held: tuple[int, ...]) -> None:
        """It will take no more: its charge is at most what it holds."""
        lease = self._leases[attempt_id]
        charge = tuple(map(min, lease.charge, held))
        self._charged = _sum(_difference(self._charged, lease.charge), charge)
        lease.charge = charge

    def end(self, attempt_id: str) -> None:
        self.granted(attempt_id)
        self._charged = _difference(self._charged, self._leases.pop(attempt_id).charge)

    def check(self, held: dict[str, tuple[int, ...]]) -> None:
        """Raise `AssertionError` unless sums and leases agree; `held`: blocks per group that each attempt references."""
        assert held.keys() == self._leases.keys(), "leases and block tables differ"
        charged, ungranted = (0,) * len(self._num_blocks), dict[str, tuple[int, ...]]()
        for attempt_id, lease in self._leases.items():
            charged = _sum(charged, lease.charge)
            over = [g for g, charge in enumerate(lease.charge) if charge and held[attempt_id][g] > charge]
            assert not over, f"{attempt_id} holds more than its charge in groups {over}"
            if lease.waits_for is not None:
                none = (0,) * len(lease.blocks)
                ungranted[lease.waits_for] = _sum(ungranted.get(lease.waits_for, none), lease.blocks)
        assert charged == self._charged, "charges do not add up"
        assert ungranted == self._ungranted, "shares do not add up"
        assert self.fits((0,) * len(charged)), "more is promised than there is"


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(add, a, b))


def _difference(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sub, a, b))
