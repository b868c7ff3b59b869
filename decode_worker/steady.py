"""Many equal rounds of decode steps at once: how far the same rows go on, and what that does to their blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Seq

from ..engine.block_pool import BlockPool
from ..engine.slots import Slots
from .growth import Growth
from .roster import Roster
from .sequence import Sequence


class Steady:
    """Rounds in which each sequence that runs has a row, and all decode. What was seen of these holds until others run, or a step is
    decided by itself (`forget`): a message comes every few rounds, and to look at all of them each time took as long as to make the
    rounds. No step is in flight when any of this is asked."""

    def __init__(self, pool: BlockPool, roster: Roster, slots: Slots, growth: Growth) -> None:
        self._pool, self._roster, self._slots, self._growth = pool, roster, slots, growth
        self._seen = -1
        self._left = self._context = 0
        self._seated = False

    def forget(self) -> None:
        """A row may be somewhere else."""
        self._seen = -1

    def _look(self) -> None:
        if self._seen == self._roster.changes:
            return
        self._seen = self._roster.changes
        left, context, slots, chunks = 1 << 31, 0, self._slots.available, False
        for sequence in self._roster.running:
            length = len(sequence.tokens)
            context += length
            slots -= sequence.slot < 0
            chunks |= sequence.decided < sequence.target
            if sequence.limit - length < left:
                left = sequence.limit - length
        self._seated = slots == self._slots.available
        self._left = 0 if chunks or slots < 0 or not self._roster.running else left
        self._context = context

    @property
    def context(self) -> int:
        """How many tokens those have together that run."""
        self._look()
        return self._context

    @property
    def left(self) -> int:
        """Rounds until the first of them has all its tokens; 0 if some compute a chunk, or get no slot."""
        self._look()
        return self._left

    def rounds(self) -> int:
        """For how many of these there are blocks, too (what leaves a window meanwhile is not counted on)."""
        pool, running, left = self._pool, self._roster.running, self.left
        if len(running) * (left // pool.block_size + 2) <= min(pool.available()):
            return left  # more than they can need, and nobody has to be asked
        return min([left, *(_rounds_of(pool, running, g, left) for g in range(len(pool.groups)))])

    def advance(self, rounds: int, token_id: int, last_step: int) -> None:
        """What so many rounds of single steps, up to `last_step`, that draw `token_id` would do to them and their block tables."""
        self._look()
        running = self._roster.running
        if not self._seated:
            self._seated = all(map(self._growth.seat, running))
        advance_rows(self._pool, running, rounds, token_id, last_step)
        self._left -= rounds
        self._context += rounds * len(running)


def _rounds_of(pool: BlockPool, running: Seq[Sequence], g: int, most: int) -> int:
    """How many of `most` rounds the blocks of group `g` last."""
    size, free = pool.block_size, pool.parts[g].available
    spare = Counter(len(sequence.table.tables[g]) * size - sequence.decided for sequence in running)

    def exceeds(rounds: int) -> bool:
        return sum(count * -(-(rounds - positions) // size) for positions, count in spare.items() if rounds > positions) > free

    return bisect_left(range(1, most + 1), True, key=exceeds)


def advance_rows(pool: BlockPool, running: Seq[Sequence], rounds: int, token_id: int, last_step: int) -> None:
    """As `Steady.advance`.

    A table changes only at the positions where a block opens, leaves a window or becomes whole: every 16th, so a round looks at
    few rows, and most rounds at none. The order of changes is that of single steps, or the pool would not be the same afterwards: the first
    of a round takes the blocks of all, while nothing is in flight, and its last publishes what has become whole.
    """
    size, windows = pool.block_size, [group.window for group in pool.groups if group.window]
    drawn = [token_id] * rounds
    changing: dict[int, list[Sequence]] = {}
    filling: dict[int, list[Sequence]] = {}
    for sequence in running:
        decided = sequence.decided
        sequence.tokens += drawn
        sequence.decided = sequence.done = decided + rounds
        within = decided % size
        if within and within + rounds < size and not windows:
            continue  # its block neither opens nor fills
        opens = -decided % size
        if windows:
            for ahead in _changes(sequence, decided, windows, size):
                if ahead < rounds:
                    changing.setdefault(ahead, []).append(sequence)
        elif opens < rounds:
            changing.setdefault(opens, []).append(sequence)
        if (fills := (opens - 1) % size) < rounds:
            filling.setdefault(fills, []).append(sequence)
    turns = sorted({*changing, *filling})
    for cycle in range(0, rounds, size):
        for turn in turns:
            if (ahead := cycle + turn) >= rounds:
                break
            for sequence in changing.get(turn, ()):
                position = sequence.decided - rounds + ahead
                sequence.table.slide(position)
                enough = sequence.table.extend(position + 1, position)
                assert enough, "not steady"
            for sequence in filling.get(turn, ()):
                sequence.table.publish(sequence.tokens, sequence.decided - rounds + ahead + 1)
    pool.submitted(last_step)
    pool.completed(last_step)


def _changes(sequence: Sequence, decided: int, windows: Seq[int], size: int) -> set[int]:
    """In which of `size` rounds from `decided` on its table changes: a block opens or leaves a window; in the first, if a chunk went past
    that."""
    changes = {-decided % size, *((window - 1 - decided) % size for window in windows)}
    return changes if sequence.table.ready(decided, decided + 1) else changes | {0}
