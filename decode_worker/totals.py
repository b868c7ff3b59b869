"""What a decode worker has done since it started, for its report."""

from __future__ import annotations

from dataclasses import dataclass

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
