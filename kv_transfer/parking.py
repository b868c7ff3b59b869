"""Offers that came before their Decode: each waits for the same time, and there are only so many."""

from __future__ import annotations

from dataclasses import replace

from ..core.value import value

MOST_PARKED = 4096
"""A router tells both workers in the same breath, so there are few."""


@value
class Parked:
    """An Offer that came on `lane` and is given up at `until`."""

    lane: int
    prompt_tokens: int
    until: float
    nearly_done: bool = False


class Parking:
    """Parked Offers by transfer id, in the order they came."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._parked: dict[str, Parked] = {}

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._parked

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def full(self) -> bool:
        return len(self._parked) >= MOST_PARKED

    @property
    def next_deadline(self) -> float | None:
        return next(iter(self._parked.values())).until if self._parked else None

    def add(self, transfer_id: str, lane: int, prompt_tokens: int, now: float) -> None:
        self._parked[transfer_id] = Parked(lane, prompt_tokens, now + self._wait_s)

    def nearly_done(self, lane: int, transfer_id: str) -> None:
        """Remember it of an Offer that was parked by that lane."""
        parked = self._parked.get(transfer_id)
        if parked is not None and parked.lane == lane:
            self._parked[transfer_id] = replace(parked, nearly_done=True)

    def take(self, transfer_id: str) -> Parked | None:
        return self._parked.pop(transfer_id, None)

    def take_from(self, lane: int, transfer_id: str) -> bool:
        """Whether the Offer was parked, and by that lane; then it is no more."""
        parked = self._parked.get(transfer_id)
        return parked is not None and parked.lane == lane and self._parked.pop(transfer_id) is parked

    def take_lane(self, lane: int) -> list[str]:
        """All that came on `lane`."""
        gone = [transfer_id for transfer_id, parked in self._parked.items() if parked.lane == lane]
        for transfer_id in gone:
            del self._parked[transfer_id]
        return gone

    def take_expired(self, now: float) -> list[tuple[str, Parked]]:
        """All whose wait is over."""
        gone = [(transfer_id, parked) for transfer_id, parked in self._parked.items() if parked.until <= now]
        for transfer_id, _ in gone:
            del self._parked[transfer_id]
        return gone

    def check(self, lanes: set[int], live: set[str]) -> None:
        """Raise `AssertionError` if an invariant does not hold; `live`: transfers that are expected."""
        assert len(self._parked) <= MOST_PARKED
        assert not self._parked.keys() & live, "an expected Offer is not parked"
        assert {parked.lane for parked in self._parked.values()} <= lanes, "a parked Offer has a lane"
