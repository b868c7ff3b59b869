"""Cores on loan: a rank that has nothing to compute lends its cores to those of its host that have.

A table in shared memory holds three words for each core: since when its owner has been idle (nanoseconds of the monotonic clock, which is
one for all processes of a host; 0: it is computing, or nobody owns it), which process has borrowed it, and which one owns it. The owner
needs nobody's leave to compute again: it says so, whoever has borrowed the core sees that before its next product, and so long, a few
milliseconds at most, the owner waits: two threads on one core would keep each other longer. What a process has borrowed that was killed
is to be had again; so are its own cores, until another owns them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

from .patience import Patience

WORD, WORDS = 8, 3
GONE_NS = 1_000_000_000
"""How often it is looked whether owner and borrower of a core still live: one that was killed writes nothing more into the table."""
WAIT_NS = 3_000_000
"""How long an owner waits for a product to end, at most: all but the largest take less than one millisecond."""


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
        self, table: CoreTable, own: Sequence[int], pid: int, *, patience: Patience,
        use: Callable[[Sequence[int]], None], now: Callable[[], int], pause: Callable[[], None], lives: Callable[[int], bool],
    ) -> None:  # fmt: skip
        """`own`: its cores, no other rank's. `pid`: its process. `patience`: of this rank. `use` is told on which cores to compute from now
        on. `now`: nanoseconds. `pause` leaves the core to others for a moment, a fraction of a product. `lives`: whether a process does."""
        self._table, self._own, self._me, self._patience, self._use, self._now = table, tuple(own), pid, patience, use, now
        self._pause, self._lives = pause, lives
        self._others = [core for core in range(table.cores) if core not in self._own]
        self._used: tuple[int, ...] = ()
        self._snapshot = b""
        self._again = 0.0
        """When to look again though nobody has written anything."""
        self._idle = False
        self._rows = 0
        self._seen_idle: set[int] = set()
        """Cores of others that were idle when last looked at, since this rank began to compute."""
        for core in self._own:
            table.set_owner(core, pid)

    def busy(self, rows: int = 1) -> None:
        """There is a step of `rows` rows to compute: its cores are its own, as soon as nobody else computes on them."""
        if rows != self._rows:
            self._rows, self._again = rows, 0.0
        for core in self._own:
            self._table.set_idle(core, 0)
        if self._idle:
            self._idle = False
            until = self._now() + WAIT_NS
            while any(self._is_lent(core) for core in self._own) and self._now() < until:
                self._pause()

    def idle(self) -> None:
        """There is nothing to compute: nothing is borrowed, and its cores are to be had."""
        self._compute_on(())
        self._seen_idle.clear()
        for core in self._others:
            self._give_back(core)
        self._idle, since = True, self._now()
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
                self._wanted(core, now)
                self._give_back(core)
                self._again = min(self._again, now + GONE_NS)
                continue
            self._seen_idle.add(core)
            rest_ns = self._patience.rest_ns(self._rows, since)
            if borrower == self._me:
                had.append(core)
            elif borrower and not self._killed(borrower):
                self._again = min(self._again, now + GONE_NS)
            elif now - since >= rest_ns:
                self._table.set_borrower(core, self._me)
            else:
                self._again = min(self._again, since + rest_ns)
        self._compute_on(tuple(had))

    def _wanted(self, core: int, now: int) -> None:
        """Its owner computes."""
        if core in self._seen_idle:
            self._seen_idle.remove(core)
            self._patience.disturbed(now)

    def _is_lent(self, core: int) -> bool:
        borrower = self._table.borrower(core)
        return borrower != 0 and not self._killed(borrower)

    def _killed(self, pid: int) -> bool:
        return pid != 0 and not self._lives(pid)

    def _give_back(self, core: int) -> None:
        if self._table.borrower(core) == self._me:
            self._table.set_borrower(core, 0)

    def _compute_on(self, borrowed: tuple[int, ...]) -> None:
        if self._own + borrowed != self._used:
            self._used = self._own + borrowed
            self._use(self._used)
