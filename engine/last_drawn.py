"""What was drawn last in each slot, so that a row may be decided before its token is known."""

from __future__ import annotations

from dataclasses import replace

from .batch import Batch, StepOutput


class LastDrawn:
    """The token last drawn in each slot. In a worker of many ranks the rank that draws knows it, and the leader, which is told."""

    def __init__(self, slots: int) -> None:
        self.tokens = [0] * slots

    def note(self, batch: Batch, output: StepOutput) -> None:
        """A slot's token is the one of its row's first draw."""
        for row, drawn in zip(batch.rows, output.drawn, strict=True):
            if drawn:
                self.tokens[row.slot] = drawn[0].token_id

    def resolve(self, batch: Batch) -> Batch:
        """The batch as every rank can compute it: each row with its tokens. To be called when all that was drawn before is noted."""
        rows = tuple(row if row.token_ids else replace(row, token_ids=(self.tokens[row.slot],)) for row in batch.rows)
        return replace(batch, rows=rows)
