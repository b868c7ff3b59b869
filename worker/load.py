"""What a scheduler says of itself for the worker's report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """The numbers of `core.fleet.WorkerReport` that a scheduler knows; the fields mean what they mean there.

    `counters`: monotonic totals by metric name (`core.metrics`).
    """

    waiting: int
    running: int
    prompt_tokens_waiting: int
    blocks_free: int
    blocks_total: int
    leases: int
    counters: tuple[tuple[str, float], ...] = ()
