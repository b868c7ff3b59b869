"""Many equal rounds of decode steps at once: how far the same rows go on, and what that does to their blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush

from ..engine.block_pool import BlockPool
from ..engine.slots import Slots
from .growth import Growth
from .roster import Roster
from .sequence import Sequence


class Steady:
    """Rounds in which each sequence that runs has a row, and all decode. No step is in flight when any of this is asked.

    A round moves each row by one position, so it is only counted: what a sequence says of itself is as old as its entry in `_since`
    until it is caught up with (`settle`). What a round has to look at are the tables that change in it, a sixteenth of all. Who ends, and
    when, is known from the first round on. What was seen is kept until others run, or a step is decided by itself (`forget`): a message
    comes every few rounds, and to look at all of them each time took as long as to make the rounds."""

    def __init__(self, pool: BlockPool, roster: Roster, slots: Slots, growth: Growth) -> None:
        self._pool, self._roster, self._slots, self._growth = pool, roster, slots, growth
        self._size, self._windows = pool.block_size, [window for _, window in pool.windows]
        self._seen = -1
        self._rounds = self._settled = self._token_id = 0
        self._clear()

    def _clear(self) -> None:
        self._since: dict[Sequence, int] = {}
        """Those that run, the oldest first, and how many rounds had been made when their numbers were right."""
        self._changing: list[list[Sequence]] = [[] for _ in range(self._size)]
        """Those of which a block opens or leaves a window in rounds of this number, modulo the block size."""
        self._ends: list[tuple[int, int, Sequence]] = []
        """When each has all its tokens: a heap of rounds, and its age."""
        self._seatless: list[Sequence] = []
        self._context = 0
        self._chunks = False
        self._fresh = False
        """Whether somebody is in their first round: a window may be behind, if a chunk went past the position where a block leaves it."""

    # -- who runs --------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """A row may be somewhere else."""
        self._seen = -1

    def settle(self) -> None:
        """Have every sequence say of itself what is true now. To be called before anybody looks at those that run."""
        if self._settled != self._rounds:
            self._settled = self._rounds
            for sequence in self._since:
                self._catch_up(sequence, self._rounds)

    def _catch_up(self, sequence: Sequence, rounds: int) -> None:
        if behind := rounds - self._since[sequence]:
            sequence.tokens += (self._token_id,) * behind
            sequence.decided = sequence.done = sequence.decided + behind
            self._since[sequence] = rounds

    def _look(self) -> None:
        if self._seen == self._roster.changes:
            return
        self.settle()
        self._seen = self._roster.changes
        self._clear()
        for sequence in self._roster.running:
            self._add(sequence)
        heapify(self._ends)

    def _add(self, sequence: Sequence) -> None:
        """The youngest. (`_ends` is no heap afterwards.)"""
        rounds, decided, size = self._rounds, sequence.decided, self._size
        length = len(sequence.tokens)
        self._since[sequence] = rounds
        self._context += length
        self._ends.append((rounds + sequence.limit - length, sequence.order, sequence))
        self._chunks |= decided < sequence.target
        if sequence.slot < 0:
            self._seatless.append(sequence)
        for phase in self._phases(decided):
            self._changing[(rounds + phase) % size].append(sequence)
        self._fresh = True

    def _phases(self, decided: int) -> set[int]:
        """After how many rounds, modulo the block size, the table of a sequence changes that has `decided` positions."""
        return {-decided % self._size, *((window - 1 - decided) % self._size for window in self._windows)}

    def join(self, sequence: Sequence) -> None:
        """It runs, and is the youngest: look at no other, if nobody else has come or gone."""
        if self._seen != self._roster.changes - 1 or self._roster.running[-1] is not sequence:
            return
        self._seen += 1
        self._add(sequence)
        heappush(self._ends, self._ends.pop())

    def take_ended(self) -> list[Sequence]:
        """Those that have all their tokens, the oldest first; they are about to leave."""
        self._look()
        ended = []
        while self._ends and self._ends[0][0] <= self._rounds:
            sequence = heappop(self._ends)[2]
            self._catch_up(sequence, self._rounds)
            since = self._since.pop(sequence)
            self._context -= len(sequence.tokens)
            for phase in self._phases(sequence.decided):
                self._changing[(since + phase) % self._size].remove(sequence)
            ended.append(sequence)
        self._seen += len(ended)
        return ended

    # -- what may be asked of them ---------------------------------------------------------------------------------------

    @property
    def reads(self) -> bool:
        """Whether some may compute a chunk."""
        return self._chunks or self._seen != self._roster.changes

    @property
    def context(self) -> int:
        """How many tokens those have together that run."""
        self._look()
        return self._context

    @property
    def left(self) -> int:
        """Rounds until the first of them has all its tokens; 0 if some compute a chunk, or get no slot."""
        self._look()
        if self._chunks or not self._ends or len(self._seatless) > self._slots.available:
            return 0
        return self._ends[0][0] - self._rounds

    def rounds(self) -> int:
        """For how many of these there are blocks, too (what leaves a window meanwhile is not counted on)."""
        pool, running, left = self._pool, self._roster.running, self.left
        if len(running) * (left // self._size + 2) <= min(pool.available()):
            return left  # more than they can need, and nobody has to be asked
        self.settle()
        return min([left, *(_rounds_of(pool, running, g, left) for g in range(len(pool.groups)))])

    # -- rounds ----------------------------------------------------------------------------------------------------------

    def advance(self, rounds: int, token_id: int, last_step: int) -> None:
        """What so many rounds of single steps, up to `last_step`, that draw `token_id` would do to them and their block tables.

        The order of changes is that of single steps, or the pool would not be the same afterwards.
        """
        self._look()
        if self._seatless:
            self._seatless = [sequence for sequence in self._seatless if not self._growth.seat(sequence)]
        if token_id != self._token_id:
            self.settle()
            self._token_id = token_id
        (self._slide if self._windows else self._open)(range(self._rounds, self._rounds + rounds))
        self._fresh = False
        self._rounds += rounds
        self._context += rounds * len(self._since)
        self._pool.submitted(last_step)
        self._pool.completed(last_step)

    def _slide(self, rounds: range) -> None:
        """Blocks that leave a window, and those that open."""
        since, changing, size = self._since, self._changing, self._size
        for now in rounds:
            for sequence in tuple(since) if now == rounds[0] and self._fresh else changing[now % size]:
                position, table = sequence.decided + now - since[sequence], sequence.table
                if table.slides(position):
                    self._catch_up(sequence, now)
                    table.publish(sequence.tokens, position)
                    table.slide(position)
                enough = table.extend(position + 1, position)
                assert enough, "not steady"

    def _open(self, rounds: range) -> None:
        """As `_slide` where there are no windows: blocks only open, a sequence's at most once in as many rounds as one has positions."""
        since, changing, size = self._since, self._changing, self._size
        for some in (rounds[first : first + size] for first in range(0, len(rounds), size)):
            opening = [
                each.table for now in some for each in changing[now % size] if not each.table.reaches(each.decided + now - since[each] + 1)
            ]
            enough = self._pool.open_next(opening)
            assert enough, "not steady"


def _rounds_of(pool: BlockPool, running: Seq[Sequence], g: int, most: int) -> int:
    """How many of `most` rounds the blocks of group `g` last."""
    size, free = pool.block_size, pool.parts[g].available
    spare = Counter(len(sequence.table.tables[g]) * size - sequence.decided for sequence in running)

    def exceeds(rounds: int) -> bool:
        return sum(count * -(-(rounds - positions) // size) for positions, count in spare.items() if rounds > positions) > free

    return bisect_left(range(1, most + 1), True, key=exceeds)
