"""The next row of a sequence in a step of a decode worker."""

from __future__ import annotations

from ..engine.batch import Draw, Row
from ..worker.chunks import chunk_stop
from .choices import draws_of
from .decision import Draft
from .growth import Growth
from .sequence import Sequence
from .totals import Totals


class Rows:
    """`stages`: as of the scheduler."""

    def __init__(self, growth: Growth, totals: Totals, block_size: int, stages: int) -> None:
        self._growth, self._totals, self._block_size, self._stages = growth, totals, block_size, stages

    def add(self, draft: Draft, sequence: Sequence, *, may_preempt: bool) -> None:
        """The sequence's next row, if it has one and there are a slot, budget and blocks for it. One that decodes takes its blocks in order
        of age too, be this its step or one of the next."""
        start, length = sequence.decided, sequence.length
        if length >= sequence.limit or (sequence.pending and (sequence.shared or self._stages > 1)):
            return
        chunked = not sequence.decoding
        stop = chunk_stop(start, length, draft.budget, self._block_size) if chunked else length
        if stop == start or not self._growth.provide(draft, sequence, stop, may_preempt=may_preempt):
            return
        if chunked:
            draft.budget -= stop - start
            self._totals.computed(sequence, stop - start)
        elif draft.share:
            draft.share -= 1
        else:
            return
        token_ids = () if sequence.pending else tuple(sequence.tokens[start:stop])
        draws: tuple[Draw, ...] = ()
        if stop == length:
            draws = draws_of(sequence)
            sequence.pending += 1
        sequence.decided = stop
        draft.chosen.append((sequence, Row(sequence.slot, start, token_ids, sequence.table.tables, draws)))
