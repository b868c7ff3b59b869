"""What a scheduler says of itself for the worker's report."""

from __future__ import annotations

from ..core.fleet import GRANTS_WAITING, Measure
from ..core.value import value
from ..engine.block_pool import BlockPool


@value
class Load:
    """The numbers of `core.fleet.WorkerReport` that a scheduler knows; the fields mean what they mean there."""

    waiting: int
    running: int
    prompt_tokens_waiting: int
    blocks_free: int
    blocks_total: int
    leases: int


def measures(pool: BlockPool, grants_waiting: int) -> tuple[Measure, ...]:
    """What both phases' schedulers measure; asked for a report alone, as it costs more than the rest of it."""
    blocks = (Measure("diptych_worker_blocks", count, state) for state, count in pool.by_state().items())
    return (Measure(GRANTS_WAITING, grants_waiting), *blocks)
