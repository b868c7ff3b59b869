"""Many equal rounds of decode steps at once: how far the same rows go on, and what that does to their blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Seq

from ..engine.block_pool import BlockPool
from .sequence import Sequence


def steady_rounds(pool: BlockPool, running: Seq[Sequence], slots: int) -> int:
    """For how many rounds, in which each has a row, all of `running` decode, none ends before the last of them, each has one of `slots` or
    gets it, and none needs more blocks than there are (what leaves a window meanwhile is not counted on). No step is in flight."""
    rounds = 1 << 31
    for sequence in running:
        if sequence.decided < sequence.target:
            return 0
        slots -= sequence.slot < 0
        left = sequence.limit - len(sequence.tokens)
        if left < rounds:
            rounds = left
    if not running or slots < 0:
        return 0
    if len(running) * (rounds // pool.block_size + 2) <= min(pool.available()):
        return rounds  # more than they can need, and nobody has to be asked
    return min([rounds, *(_rounds_of(pool, running, g, rounds) for g in range(len(pool.groups)))])


def _rounds_of(pool: BlockPool, running: Seq[Sequence], g: int, most: int) -> int:
    """How many of `most` rounds the blocks of group `g` last."""
    size, free = pool.block_size, pool.parts[g].available
    spare = Counter(len(sequence.table.tables[g]) * size - sequence.decided for sequence in running)

    def exceeds(rounds: int) -> bool:
        return sum(count * -(-(rounds - positions) // size) for positions, count in spare.items() if rounds > positions) > free

    return bisect_left(range(1, most + 1), True, key=exceeds)


def advance_rows(pool: BlockPool, running: Seq[Sequence], rounds: int, token_id: int, last_step: int) -> None:
    """What `rounds` rounds of single steps, up to `last_step`, that draw `token_id` would do to `running` and their block tables.

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
        opens = -decided % size
        for ahead in _changes(sequence, windows, size) if windows else (opens,):
            if ahead < rounds:
                changing.setdefault(ahead, []).append(sequence)
        if (fills := (opens - 1) % size) < rounds:
            filling.setdefault(fills, []).append(sequence)
        sequence.tokens += drawn
        sequence.decided = sequence.done = decided + rounds
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


def _changes(sequence: Sequence, windows: Seq[int], size: int) -> set[int]:
    """In which of the next `size` rounds its table changes: a block opens or leaves a window; in the first, if a chunk went past that."""
    decided = sequence.decided
    changes = {-decided % size, *((window - 1 - decided) % size for window in windows)}
    return changes if sequence.table.ready(decided, decided + 1) else changes | {0}
