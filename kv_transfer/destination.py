"""The destination's shell: joins the pure `DestinationMachine` to lanes, the copy thread and time."""

from __future__ import annotations

from ..core.clock import Clock
from ..core.layout import Layout
from ..core.transfer import GroupGrant, RefusedReason
from .events import DestinationEvents
from .lanes import Lane
from .pool import Pool


class Destination:
    """Takes KV into this worker's pool. Every method is called on the asyncio thread and returns at once."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        pool: Pool,
        layout: Layout,
        clock: Clock,
        lease_s: float,
        offer_wait_s: float,
        events: DestinationEvents,
    ) -> None:
        """Construct while the loop runs."""
        raise NotImplementedError

    def expect(self, transfer_id: str) -> None:
        """A Decode has come; its Offer may already be parked. An id that was used before fails at once."""
        raise NotImplementedError

    def grant(self, transfer_id: str, groups: tuple[GroupGrant, ...]) -> None:
        """Give blocks to an offered transfer, one `GroupGrant` per cache group. Ignored if it has ended meanwhile (then `released`
        was or will be called, and nothing touches the blocks)."""
        raise NotImplementedError

    def refuse(self, transfer_id: str, reason: RefusedReason, message: str) -> None:
        """Turn an offered transfer down; `failed` with `message` and `released` come at once. Ignored if it has ended."""
        raise NotImplementedError

    def cancel(self, transfer_id: str) -> None:
        """Give the transfer up: `failed` with `Cancelled` at once, `released` when no copy runs any more. Unknown ids are ignored."""
        raise NotImplementedError

    @property
    def leases(self) -> int:
        """Transfers that hold granted blocks: granted and neither committed nor released."""
        raise NotImplementedError

    async def serve_lane(self, lane: Lane) -> None:
        """Speak with one source until the lane ends; then everything on it has failed."""
        raise NotImplementedError

    async def close(self) -> None:
        """Cancel everything, hang up all lanes; returns when the copy thread has ended."""
        raise NotImplementedError
