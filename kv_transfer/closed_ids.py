"""Ids of transfers that have ended, remembered for a minute so that a late Offer or a repeated id is known for what it is."""

from __future__ import annotations

from collections import OrderedDict

REMEMBER_S = 60.0
REMEMBER_AT_MOST = 65_536
"""At this many the oldest is forgotten early: 1,000 transfers a second for the whole minute."""


class ClosedIds:
    """A set whose members leave after `REMEMBER_S` seconds."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()
        """Members in the order they came. A dict would look for its first through the places of all that have left."""

    def add(self, transfer_id: str, now: float) -> None:
        self._forget(now)
        self._until.pop(transfer_id, None)
        self._until[transfer_id] = now + REMEMBER_S
        if len(self._until) > REMEMBER_AT_MOST:
            self._until.popitem(last=False)

    def has(self, transfer_id: str, now: float) -> bool:
        return self._until.get(transfer_id, now) > now

    def _forget(self, now: float) -> None:
        # Members leave in the order they came, so the first that stays ends the search.
        while self._until:
            oldest = next(iter(self._until))
            if self._until[oldest] > now:
                return
            self._until.popitem(last=False)

    def __len__(self) -> int:
        return len(self._until)
