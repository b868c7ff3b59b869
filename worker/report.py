"""A worker's report, made of what its scheduler and its role count."""

from __future__ import annotations

from ..core.fleet import Measure, WorkerReport, WorkerState
from .load import Load

CHECKS = "diptych_worker_checks_total"
IDLE_CHECKS = "diptych_worker_idle_checks_total"
ROLE_FLIPS = "diptych_worker_role_flips_total"
REFUSED = "diptych_worker_transfers_refused_total"


class Reporter:
    """Knows who the worker is, and keeps the totals that are the role's rather than the scheduler's."""

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self._worker_id, self._incarnation = worker_id, incarnation
        self._totals: dict[str, float] = {}
        self._refused: dict[str, float] = {}

    def count(self, metric: str, value: float = 1.0) -> None:
        self._totals[metric] = self._totals.get(metric, 0.0) + value

    def refused(self, reason: str) -> None:
        """Count an Offer refused for this reason."""
        self._refused[reason] = self._refused.get(reason, 0.0) + 1.0

    def report(
        self, state: WorkerState, load: Load, counters: tuple[tuple[str, float], ...], measures: tuple[Measure, ...]
    ) -> WorkerReport:
        return WorkerReport(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            state=state,
            waiting=load.waiting,
            running=load.running,
            prompt_tokens_waiting=load.prompt_tokens_waiting,
            blocks_free=load.blocks_free,
            blocks_total=load.blocks_total,
            leases=load.leases,
            counters=(*counters, *self._totals.items()),
            measures=(*measures, *(Measure(REFUSED, count, reason) for reason, count in self._refused.items())),
        )

    def checked(self, load: Load, *, idle: bool) -> None:
        """Count a check of the books that found them right. Raise `AssertionError` if an idle worker still holds something."""
        self.count(CHECKS)
        if not idle:
            return
        held = (load.waiting, load.running, load.prompt_tokens_waiting, load.leases, load.blocks_total - load.blocks_free)
        if any(held):
            raise AssertionError(f"idle, and yet (waiting, running, prompt tokens, leases, blocks held) are {held}")
        self.count(IDLE_CHECKS)
