"""Many equal rounds of decode steps at once: how far the same rows go on, and what that does to their blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq

from ..engine.block_pool import BlockPool
from .sequence import Sequence


def steady_rounds(pool: BlockPool, running: Seq[Sequence]) -> int:
    """For how many rounds, in which each has a row, all of `running` decode, none ends and none needs more blocks than there are (what
    leaves a window meanwhile is not counted on). No step is in flight."""
    if not running or not all(sequence.decoding and sequence.slot >= 0 for sequence in running):
        return 0
    rounds = min(sequence.limit - len(sequence.tokens) for sequence in running) - 1
    if len(running) * (max(0, rounds) // pool.block_size + 2) <= min(pool.available()):
        return max(0, rounds)  # more than they can need, and nobody has to be asked

    def exceeds(rounds: int) -> bool:
        lacks = zip(*(sequence.table.lacks(sequence.decided + rounds, 0) for sequence in running), strict=True)
        return any(sum(column) > free for column, free in zip(lacks, pool.available(), strict=True))

    return bisect_left(range(1, rounds + 1), True, key=exceeds)


def advance_blocks(pool: BlockPool, running: Seq[Sequence], first_step: int, rounds: int, steps: int) -> None:
    """What `rounds` rounds of `steps` single steps from `first_step` on would do to the block tables of `running`, whose tokens are known
    already.

    A table changes only at the positions where a block opens, leaves a window or becomes whole: every 16th, so a round looks at
    few rows. The order of changes is that of single steps, or the pool would not be the same afterwards: the first of a round takes
    the blocks of all.
    """
    size = pool.block_size
    opens = {0} | {(group.window - 1) % size for group in pool.groups if group.window}
    changing: list[list[Sequence]] = [[] for _ in range(size)]
    filling: list[list[Sequence]] = [[] for _ in range(size)]
    for sequence in running:
        turns = {(place - sequence.decided) % size for place in opens}
        if not sequence.table.ready(sequence.decided, sequence.decided + 1):  # after a chunk
            turns.add(0)
        for ahead in turns:
            changing[ahead].append(sequence)
        filling[(size - 1 - sequence.decided) % size].append(sequence)
    for ahead in range(rounds):
        for sequence in changing[ahead % size]:
            sequence.table.slide(sequence.decided + ahead)
            enough = sequence.table.extend(sequence.decided + ahead + 1, sequence.decided + ahead)
            assert enough, "not steady"
        last_step = first_step + (ahead + 1) * steps - 1
        pool.submitted(last_step)
        pool.completed(last_step)
        for sequence in filling[ahead % size]:
            sequence.table.publish(sequence.tokens, sequence.decided + ahead + 1)
    for sequence in running:
        sequence.decided = sequence.done = sequence.decided + rounds
