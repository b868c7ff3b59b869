"""Cores on loan: a rank that has nothing to compute lends its cores to those of its host that have.

A table in shared memory holds three words for each core: since when its owner has been idle (nanoseconds of the monotonic clock, which is
one for all processes of a host; 0: it is computing, or nobody owns it), which process has borrowed it, and which one owns it. The owner
needs nobody's leave to compute again: it says so, and whoever has borrowed the core sees that before its next product. So a core has two
users for a product at most. What a process has borrowed that was killed is to be had again; so are its own cores, until another owns them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

from ..core.fleet import Phase

WORD, WORDS = 8, 3
REST_NS = {Phase.PREFILL: 2_000_000, Phase.DECODE: 1_000_000_000}
"""How long an owner must have been idle before its core is borrowed. A prompt is read faster with any core that is free for a moment. An
answer's tokens are to come evenly, and where prompts come every second or so a core that is borrowed and taken back makes some of them
late: with 2 ms here too, at 0.75 prompts a second, ITL p50 was 20 ms in place of 24 and p99 54 in place of 35."""


GONE_NS = 1_000_000_000
"""How often it is looked whether owner and borrower of a core still live: one that was killed writes nothing more into the table."""


class CoreTable:
    """The words of some cores, 0 at first, in memory that every rank of a host maps."""

    def __init__(self, fd: int, cores: int) -> None:
        """Raises `OSError` or `ValueError` if `fd` is not `size(cores)` long."""
        self._mapped = mmap.mmap(fd, self.size(cores))
        self._words = memoryview(self._mapped).cast("Q")
        self.cores = cores

    @staticmethod
    def size(cores: int) -> int:
        """In bytes."""
        return WORDS * cores * WORD

    def snapshot(self) -> bytes:
        return self._mapped[:]

    def idle_since(self, core: int) -> int:
        return self._words[WORDS * core]

    def set_idle(self, core: int, since: int) -> None:
        self._words[WORDS * core] = since

    def borrower(self, core: int) -> int:
        return self._words[WORDS * core + 1]

    def set_borrower(self, core: int, pid: int) -> None:
        self._words[WORDS * core + 1] = pid

    def owner(self, core: int) -> int:
        return self._words[WORDS * core + 2]

    def set_owner(self, core: int, pid: int) -> None:
        self._words[WORDS * core + 2] = pid

    def close(self) -> None:
        self._words.release()
        self._mapped.close()


class Lending:
    """One rank's side. All calls come from the thread that computes."""

    def __init__(
        self, table: CoreTable, own: Sequence[int], pid: int, *,
        rest_ns: int, use: Callable[[Sequence[int]], None], now: Callable[[], int], lives: Callable[[int], bool],
    ) -> None:  # fmt: skip
        """`own`: its cores, no other rank's. `pid`: its process. `rest_ns`: how long the owner of a core must have been idle before it is
        borrowed. `use` is told on which cores to compute from now on. `now`: nanoseconds. `lives`: whether a process does."""
        self._table, self._own, self._me, self._rest_ns, self._use, self._now = table, tuple(own), pid, rest_ns, use, now
        self._lives = lives
        self._others = [core for core in range(table.cores) if core not in self._own]
        self._used: tuple[int, ...] = ()
        self._snapshot = b""
        self._again = 0.0
        """When to look again though nobody has written anything."""
        for core in self._own:
            table.set_owner(core, pid)

    def busy(self) -> None:
        """There is something to compute: its cores are its own."""
        for core in self._own:
            self._table.set_idle(core, 0)

    def idle(self) -> None:
        """There is nothing to compute: nothing is borrowed, and its cores are to be had."""
        self._compute_on(())
        for core in self._others:
            self._give_back(core)
        since = self._now()
        for core in self._own:
            self._table.set_idle(core, since)

    def look(self) -> int:
        """Give back what its owner wants again, take what is idle and nobody's; how many cores that makes. What is asked for now is had
        when this is called again, if nobody else has asked for it in between."""
        snapshot = self._table.snapshot()
        if snapshot != self._snapshot or self._now() >= self._again:
            self._snapshot = snapshot
            self._reckon()
        return len(self._used)

    def _reckon(self) -> None:
        now, self._again = self._now(), math.inf
        had = []
        for core in self._others:
            borrower, since = self._table.borrower(core), self._table.idle_since(core)
            if not since and not self._killed(self._table.owner(core)):
                self._give_back(core)
                self._again = min(self._again, now + GONE_NS)
            elif borrower == self._me:
                had.append(core)
            elif borrower and not self._killed(borrower):
                self._again = min(self._again, now + GONE_NS)
            elif now - since >= self._rest_ns:
                self._table.set_borrower(core, self._me)
            else:
                self._again = min(self._again, since + self._rest_ns)
        self._compute_on(tuple(had))

    def _killed(self, pid: int) -> bool:
        return pid != 0 and not self._lives(pid)

    def _give_back(self, core: int) -> None:
        if self._table.borrower(core) == self._me:
            self._table.set_borrower(core, 0)

    def _compute_on(self, borrowed: tuple[int, ...]) -> None:
        if self._own + borrowed != self._used:
            self._used = self._own + borrowed
            self._use(self._used)
