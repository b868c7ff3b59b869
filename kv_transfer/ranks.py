"""The seam between a worker's leader and its ranks: the machine's orders go to the ranks they concern, answers come back.

Orders (`actions`) and answers (`answers`) are plain values. The leader's own rank, 0, is in place; any other is behind a channel, which
keeps both directions in order and loses nothing. A channel that breaks has ended its worker, so that nobody waits for its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from ..core.transfer import ShmEndpoint
from .actions import Attach, Connect, Copy, Detach, Fence, Introduce, Receive, Stage
from .answers import DestinationAnswer, SourceAnswer

SourceOrder = Connect | Introduce | Detach | Stage | Fence
DestinationOrder = Attach | Connect | Introduce | Detach | Copy | Receive | Fence
Order = TypeVar("Order", SourceOrder, DestinationOrder)
Asked = TypeVar("Asked", SourceOrder, DestinationOrder, contravariant=True)


class Rank(Protocol[Asked]):
    """One rank, as its leader sees it. Every method is called on the leader's asyncio thread."""

    @property
    def endpoint(self) -> ShmEndpoint:
        """Of its pool."""
        ...

    def carry_out(self, order: Asked) -> None:
        """Never blocks; answers follow, perhaps before it returns."""
        ...

    async def close(self) -> None:
        """When every lane is detached and every fence answered: returns when nothing of it runs any more."""
        ...


SourceRanks = Callable[[Callable[[SourceAnswer], None]], Sequence[Rank[SourceOrder]]]
"""Makes a source's ranks from 1 on; what they answer shall be given to the function, on the asyncio thread."""
DestinationRanks = Callable[[Callable[[DestinationAnswer], None]], Sequence[Rank[DestinationOrder]]]


class Ranks(Generic[Order]):
    """All ranks of a worker, by number."""

    def __init__(self, ranks: Sequence[Rank[Order]]) -> None:
        self._ranks: Sequence[Rank[Order]] = ranks
        self._ways: dict[int, tuple[Rank[Order], ...]] = {}

    @property
    def endpoints(self) -> tuple[ShmEndpoint, ...]:
        return tuple(rank.endpoint for rank in self._ranks)

    @property
    def lanes(self) -> set[int]:
        """Those of which the ranks have been told."""
        return set(self._ways)

    def open(self, lane: int, ways: Sequence[int]) -> None:
        """On `lane` route i is rank `ways[i]`'s."""
        self._ways[lane] = tuple(self._ranks[rank] for rank in ways)

    def on(self, lane: int, route: int) -> Rank[Order]:
        """Whose the route is."""
        return self._ways[lane][route]

    def all(self, order: Order) -> None:
        """Have every rank carry out `order`."""
        for rank in self._ranks:
            rank.carry_out(order)

    def detach(self, detach: Detach) -> None:
        del self._ways[detach.lane]
        self.all(detach)

    async def close(self) -> None:
        for rank in self._ranks:
            await rank.close()
