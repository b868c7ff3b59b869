"""Who gets a decode worker's memory next: preempted requests, then the queue in order."""

from __future__ import annotations

from bisect import insort
from operator import le

from ..core.layout import CacheKind
from ..core.transfer import GroupGrant
from ..engine.block_pool import BlockPool
from .leases import Leases
from .sequence import Sequence, by_age

MAX_PASSES = 16
"""How many later requests may be given memory before one that does not fit yet."""
MAX_MISSES = 4
"""How many requests that do not fit are looked at each time: each costs a walk through the prefix table."""


class Admission:
    """`queue`: offered transfers and local prompts by attempt id, in order of arrival. `preempted`: oldest first.

    `watermark`: share of each group's blocks (at least one) that new work leaves free for the growth of what runs. It does not apply
    to a transfer that is nearly done, whose blocks will not lie idle; nor when nothing holds memory, or a request nearly as large as
    the pool would never start.
    """

    def __init__(self, pool: BlockPool, *, chunk_tokens: int, watermark: float) -> None:
        self._pool = pool
        self._chunk_tokens = chunk_tokens
        self._watermark = tuple(max(1, int(count * watermark)) for count in pool.num_blocks)
        self.queue: dict[str, Sequence] = {}
        self.preempted: list[Sequence] = []
        self.leases = Leases()
        self._windowed = any(group.kind is CacheKind.WINDOW for group in pool.groups)
        self._seen: tuple[int, ...] | None = None
        self._untold: dict[str, Sequence] = {}

    @property
    def waiting(self) -> bool:
        return bool(self.queue or self.preempted)

    @property
    def stuck(self) -> bool:
        """Whether nobody who waits can be given memory before some comes back: `admit` has looked, and nothing has changed since but that
        there is less. (Windows give memory back as they move.)"""
        return self._seen is not None and not self._windowed and all(map(le, self._pool.available(), self._seen))

    def look(self, seats: int) -> None:
        """Whoever could start has: remember with how much memory that was. Without a seat nobody was looked at."""
        self._seen = self._pool.available() if self.waiting and seats else None

    def enqueue(self, sequence: Sequence) -> None:
        """It is the last in the queue."""
        self.queue[sequence.attempt_id] = sequence
        self._seen = None

    def nearly_done(self, transfer_id: str) -> None:
        """It may be granted below the watermark. Unknown ids are ignored."""
        if (sequence := self.queue.get(transfer_id)) is not None:
            sequence.nearly_done = True
            self._seen = None

    def preempt(self, sequence: Sequence) -> None:
        """It gave its blocks back and waits for memory before all that is queued."""
        self._seen = None
        insort(self.preempted, sequence, key=by_age)

    def withdraw(self, attempt_id: str) -> Sequence | None:
        """The attempt is over: forget it in the queue, or count its grant as lost. None if it is neither queued nor granted."""
        self._seen = None
        sequence = self.queue.pop(attempt_id, None)
        if sequence is not None:
            sequence.table.close()
            return sequence
        sequence = self.leases.lose(attempt_id)
        if self._untold.pop(attempt_id, None) is not None:  # nobody knows of the blocks, so nobody will fence them
            self.leases.fenced(attempt_id)
        return sequence

    def new_grants(self) -> list[tuple[str, tuple[GroupGrant, ...]]]:
        """The grants made since the last call."""
        if not self._untold:
            return []
        grants = [(attempt_id, self._grant_of(sequence)) for attempt_id, sequence in self._untold.items()]
        self._untold = {}
        return grants

    def admit(self, seats: int) -> list[Sequence]:
        """Give memory to those next in turn, at most `seats` of them; returns the ones that start to compute here."""
        if not self.waiting:
            return []
        granted = self.leases.granted
        started = self._resume(seats)
        if not self.preempted:
            started += self._take_turns(seats - len(started))
        self.look(seats - len(started) - (self.leases.granted - granted))
        return started

    def _resume(self, seats: int) -> list[Sequence]:
        """The preempted ones that start to compute again."""
        started: list[Sequence] = []
        while self.preempted and len(started) < seats:
            sequence = self.preempted[0]
            if sequence.pending or not self._start(sequence):
                break
            started.append(self.preempted.pop(0))
        return started

    def _take_turns(self, seats: int) -> list[Sequence]:
        """Go through the queue; returns those that start to compute here."""
        started: list[Sequence] = []
        passed: list[Sequence] = []
        for sequence in list(self.queue.values()):
            if seats == 0 or (passed and (len(passed) == MAX_MISSES or any(earlier.passes >= MAX_PASSES for earlier in passed))):
                break
            if not (self._start(sequence) if sequence.local_prefill else self._grant(sequence)):
                passed.append(sequence)
                continue
            seats -= 1
            del self.queue[sequence.attempt_id]
            if sequence.local_prefill:
                started.append(sequence)
            for earlier in passed:
                earlier.passes += 1
        return started

    def _start(self, sequence: Sequence) -> bool:
        """Begin to compute a prompt here, or a preempted sequence again: all blocks of full groups, the windows' as it goes on."""
        pool, tokens, hashes = self._pool, len(sequence.tokens), sequence.table.hashes
        cached = pool.match(hashes, tokens - 1)
        costs = pool.cost(hashes, cached, tokens, cached)
        if not self._fits(tuple(min(cost, pool.most_held(g, tokens, self._chunk_tokens)) for g, cost in enumerate(costs))):
            return False
        sequence.table.adopt(cached, cached)
        sequence.table.extend(tokens, cached, full_only=True)
        sequence.decided = sequence.done = cached
        sequence.target = tokens
        if not sequence.preempted:
            sequence.cached = cached
        return True

    def _grant(self, sequence: Sequence) -> bool:
        """Lend blocks for a transfer: what is cached is pinned, the rest is new."""
        pool, tokens, hashes = self._pool, len(sequence.tokens), sequence.table.hashes
        cached = pool.match(hashes, tokens, tokens)
        if not self._fits(pool.cost(hashes, cached, tokens, tokens), below_watermark=sequence.nearly_done):
            return False
        sequence.table.adopt(cached, tokens)
        sequence.table.extend(tokens, tokens)
        sequence.cached = cached
        self.leases.grant(sequence)
        self._untold[sequence.attempt_id] = sequence
        return True

    def _fits(self, costs: tuple[int, ...], *, below_watermark: bool = False) -> bool:
        left = [available - cost for available, cost in zip(self._pool.available(), costs, strict=True)]
        if below_watermark or self._pool.unused:
            return min(left) >= 0
        return all(blocks >= mark for blocks, mark in zip(left, self._watermark, strict=True))

    def _grant_of(self, sequence: Sequence) -> tuple[GroupGrant, ...]:
        """Per group what is lacking here: from the cached prefix on; of a window group, what the next query sees of that."""
        size, grants = self._pool.block_size, []
        for g, table in enumerate(sequence.table.tables):
            first = max(sequence.cached // size, self._pool.first_block(g, len(sequence.tokens)))
            grants.append(GroupGrant(first * size, table[first:]))
        return tuple(grants)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        self.leases.check()
        orders = [sequence.order for sequence in self.preempted]
        assert orders == sorted(orders), "preempted requests are not in order of age"
        for sequence in (*self.queue.values(), *self.preempted):
            assert not any(sequence.table.held()), "a waiting request holds blocks"
