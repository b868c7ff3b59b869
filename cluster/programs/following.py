"""What a rank process runs that does not lead: its engine, and its end of the worker's transfers, behind a channel to the leader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.fleet import Phase
from ...core.model import read_card
from ...kv_transfer.destination_rank import DestinationRank
from ...kv_transfer.source_rank import SourceRank
from ...worker.follower import Follower, TransferRank
from ...worker.meeting import join
from ..process.child import died, progress, say
from ..process.spec import NewRole, RankSpec, read_spec
from .identity import hello, named, reachable_host, worker_layout
from .loading import Loaded, flipped, load


async def follow(spec: RankSpec, leader: str) -> None:
    """Find the leader at `leader` (host:port), load, say that this rank is ready, and do what the leader asks until it ends. Raises
    `DiptychError` if it cannot start, or the leader wants another; ends the process if it loses the leader later."""
    host = reachable_host(spec)
    connection = join(leader, hello(spec, worker_layout(spec, read_card(spec.model_dir))), tls=spec.internal_tls)
    progress("all ranks are there")
    follower = Follower(connection, died)
    loaded = load(spec, host, follower.store)
    say("ready", rank=spec.rank)
    draws = spec.rank == loaded.layout.ranks - loaded.layout.tp
    try:
        while (order := await follower.serve(loaded.engine, _transfers(spec, host, loaded), draws=draws)) is not None:
            spec = named(read_spec(NewRole, order.decode()).of(spec))
            loaded = flipped(loaded, spec, follower.store)
    finally:
        loaded.disconnect()
    loaded.pool.close()
    follower.close()


def _transfers(spec: RankSpec, host: str, loaded: Loaded) -> Callable[[Callable[[Any], None]], TransferRank]:
    kind = SourceRank if spec.phase is Phase.PREFILL else DestinationRank

    def make(answer: Callable[[Any], None]) -> TransferRank:
        return kind(spec.rank, loaded.pool, loaded.layout, host=host, silence_s=spec.lease_s, answer=answer)

    return make
