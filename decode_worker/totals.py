"""What a decode worker has done since it started, for its report."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ..engine.block_pool import BlockPool
from ..worker.load import Load
from .admission import Admission
from .roster import Roster
from .sequence import Sequence


@dataclass(slots=True)
class Totals:
    """Tokens of prompts found in the prefix cache and prefilled here, of anything computed again; times a request lost its memory."""

    cached_tokens: int = 0
    local_prefill_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0

    def computed(self, sequence: Sequence, positions: int) -> None:
        """Of a prompt, or of what is computed again."""
        if sequence.preempted:
            sequence.tally.recomputed_tokens += positions
            self.recomputed_tokens += positions
        else:
            sequence.tally.local_prefill_tokens += positions
            self.local_prefill_tokens += positions

    def counters(self, steps: int) -> tuple[tuple[str, float], ...]:
        return (
            ("diptych_worker_steps_total", steps),
            ("diptych_worker_cached_tokens_total", self.cached_tokens),
            ("diptych_worker_local_prefill_tokens_total", self.local_prefill_tokens),
            ("diptych_worker_recomputed_tokens_total", self.recomputed_tokens),
            ("diptych_worker_preemptions_total", self.preemptions),
        )

    def load(self, pool: BlockPool, admission: Admission, roster: Roster, reading: Seq[Sequence], *, expected: int) -> Load:
        """What the worker's report says. `reading`: of those that run all that compute chunks, and perhaps others; `expected`: attempts
        whose transfer is still to be offered."""
        free, total = pool.scarcest()
        to_compute = 0
        if admission.waiting:
            waiting = (*admission.queue.values(), *admission.preempted)
            to_compute += sum([len(each.tokens) for each in waiting if each.local_prefill or each.preempted])
        if reading:
            to_compute += sum([each.target - each.done for each in reading if each.target > each.done])
        return Load(
            waiting=expected + len(admission.queue) + admission.leases.granted,
            running=len(roster.running) + len(admission.preempted),
            prompt_tokens_waiting=to_compute,
            blocks_free=free,
            blocks_total=total,
            leases=len(admission.leases),
        )
