"""What a source says of its grants while nothing is announced on them, so that their leases do not end."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.transfer import KeepAlive
from .actions import Send, SourceAction
from .source_state import State, Transfer

PER_LEASE = 3


class GrantsKept:
    """`due`: when `say` has something to say; None while nothing is granted."""

    def __init__(self, lease_s: float) -> None:
        self._every_s = lease_s / PER_LEASE
        self.due: float | None = None

    def begin(self, now: float) -> None:
        """There is a grant (more)."""
        if self.due is None:
            self.due = now + self._every_s

    def say(self, transfers: Mapping[str, Transfer], now: float) -> list[SourceAction]:
        """If it is time, KeepAlive on each lane for what is granted there."""
        if self.due is None or now < self.due:
            return []
        granted = granted_by_lane(transfers)
        self.due = now + self._every_s if granted else None
        return [Send(lane, KeepAlive(ids)) for lane, ids in granted.items()]

    def check(self, transfers: Mapping[str, Transfer]) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert self.due is not None or not granted_by_lane(transfers), "a grant is kept alive"


def granted_by_lane(transfers: Mapping[str, Transfer]) -> dict[int, tuple[str, ...]]:
    """The transfers granted and not yet committed."""
    granted: dict[int, tuple[str, ...]] = {}
    for transfer in transfers.values():
        if transfer.state is State.GRANTED:
            granted[transfer.lane] = (*granted.get(transfer.lane, ()), transfer.transfer_id)
    return granted
