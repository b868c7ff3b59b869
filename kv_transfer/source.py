"""The source's shell: joins the pure `SourceMachine` to lanes, the pool's epoch words and time."""

from __future__ import annotations

from ..core.clock import Clock
from ..core.layout import Layout
from ..core.request import Token
from .events import SourceEvents
from .lanes import DialLane
from .pool import Pool


class Source:
    """Hands KV over from this worker's pool. Every method is called on the asyncio thread and returns at once."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        pool: Pool,
        layout: Layout,
        clock: Clock,
        lease_s: float,
        events: SourceEvents,
        *,
        dial: DialLane,
    ) -> None:
        """Construct while the loop runs. `dial` opens lanes: `rpc.lane.dial_lane`, or a test's own."""
        raise NotImplementedError

    def offer(self, transfer_id: str, destination_address: str, prompt_tokens: int) -> None:
        """Open a transfer of a prompt whose every block is owned. Raises `InvalidRequest` if the id is under way already."""
        raise NotImplementedError

    def computed(self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: tuple[tuple[int, ...], ...]) -> None:
        """KV of positions [start, stop) of `layers` is stored. Per layer, positions come in order and without holes; before or
        after the Grant. `tables` as in `engine.batch.Row`: `tables[g][i]` holds positions [i*block_size, (i+1)*block_size).
        What is computed in one turn of the loop is announced together. Unknown (ended) ids are ignored."""
        raise NotImplementedError

    def commit(self, transfer_id: str, first_tokens: tuple[Token, ...]) -> None:
        """All positions of all layers were `computed`, and these are the first tokens. Unknown (ended) ids are ignored."""
        raise NotImplementedError

    def cancel(self, transfer_id: str, reason: str) -> None:
        """Give the transfer up: `failed` with `Cancelled` and `released` come at once. Unknown (ended) ids are ignored."""
        raise NotImplementedError

    @property
    def leases(self) -> int:
        """Transfers offered and not yet released."""
        raise NotImplementedError

    async def close(self) -> None:
        """Cancel everything, hang up all lanes; returns when no task of it is left."""
        raise NotImplementedError
