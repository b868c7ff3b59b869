"""Slots and blocks of what runs on a decode worker: who gets them as it grows, and from whom they are taken."""

from __future__ import annotations

from ..engine.block_pool import BlockPool
from ..engine.slots import Slots
from .admission import Admission
from .decision import Draft
from .roster import Roster
from .sequence import Sequence
from .totals import Totals


class Growth:
    """The oldest is served first; what it lacks comes from a step in flight, from a transfer under way, or from the youngest."""

    def __init__(self, pool: BlockPool, slots: Slots, roster: Roster, admission: Admission, totals: Totals) -> None:
        self._pool, self._slots, self._roster, self._admission, self._totals = pool, slots, roster, admission, totals

    def provide(self, draft: Draft, sequence: Sequence, stop: int, *, may_preempt: bool) -> bool:
        """A slot, and blocks for positions up to `stop`. False: it waits for what will come, and nobody younger takes blocks."""
        return self.seat(sequence) and self._grow(draft, sequence, stop, may_preempt)

    def seat(self, sequence: Sequence) -> bool:
        """A slot, if it has none; False if there is none."""
        if sequence.slot < 0:
            slot = self._slots.take()
            sequence.slot = -1 if slot is None else slot
        return sequence.slot >= 0

    def _grow(self, draft: Draft, sequence: Sequence, stop: int, may_preempt: bool) -> bool:
        table, start = sequence.table, sequence.decided
        if table.ready(start, stop):
            return True
        if table.slides(start):
            table.publish(sequence.tokens, sequence.done)
            table.slide(start)
        lacks = table.lacks(stop, start)
        if not any(lacks):
            return True
        while not draft.short:
            if table.extend(stop, start):
                return True
            youngest = self._roster.running[-1]
            coming = all(lack <= part.available + part.fenced for lack, part in zip(lacks, self._pool.parts, strict=True))
            if coming or youngest is sequence or not may_preempt:
                draft.short = True
            else:
                self._preempt(youngest)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks and slot. A token it has in flight still counts; everything else is computed again when memory allows."""
        self._roster.pause(sequence)
        self.vacate(sequence)
        sequence.table = self._pool.open(sequence.table.hashes)
        sequence.decided = sequence.done = 0
        sequence.preempted = True
        self._totals.preemptions += 1
        self._admission.preempt(sequence)

    def vacate(self, sequence: Sequence) -> None:
        """Take all it has; what a step in flight may touch returns with that step."""
        sequence.table.publish(sequence.tokens, sequence.done)
        sequence.table.close()
        if sequence.slot >= 0:
            self._slots.give_back(sequence.slot, self._pool.fence)
            sequence.slot = -1
