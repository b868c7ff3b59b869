"""The one thread that copies from the pools of sources, in the order it is asked; so a fence is simply the next thing in its queue.

    asked ──▶ stored? ──▶ begun ──▶ (on a GPU: done) ──▶ does the epoch word still stand? ──▶ told
                 └── not yet: waits, and what is asked of the same source waits behind it

Whether a source has stored what it announced is its GPU's to say. One that was killed may never say it, and then only its own pieces wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from ...core.recordings import Doing
from ...core.spans import span
from ..actions import Copy
from ..crossing import Crossing
from ..cuda_streams import pauses
from ..pool import Pool
from .one_sided import PeerPool

log = logging.getLogger(__name__)

UNCOPIED = "%d pieces could not be copied"
TOGETHER_BYTES = 16 << 20
"""Pieces that wait are copied in one go, up to so much: 1 ms, the longest a fence waits. Each go needs the interpreter, which the asyncio
thread has for 70 µs at a time, as long as 1 MiB takes."""
COPIES_AT_ONCE = 4
"""Begun and not yet looked at: on a GPU the next ones are asked for while one runs, so that it never waits for the host."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One piece to copy."""

    source: PeerPool
    crossing: Crossing
    copy: Copy

    @property
    def bytes(self) -> int:
        return self.crossing.bytes(self.copy.span)


Job = Asked | Callable[[], None]


@dataclass(slots=True)
class Waiting:
    """Pieces that their source has announced and not stored. `behind`: what was asked of it since."""

    pieces: list[Asked]
    stored: Callable[[], bool] | None = None
    """As the source says it, when it has been asked."""
    behind: list[Job] = field(default_factory=list)

    def drop(self, transfer_id: str) -> None:
        self.pieces = [each for each in self.pieces if each.copy.transfer_id != transfer_id]
        self.behind = [each for each in self.behind if not isinstance(each, Asked) or each.copy.transfer_id != transfer_id]


class Copies:
    """The copy thread. `copied(transfer_id, seq, error or None)` and `fenced(transfer_id)` are called on the asyncio thread."""

    def __init__(self, pool: Pool, copied: Callable[[str, int, str | None], None], fenced: Callable[[str], None]) -> None:
        self._pool = pool
        self._copied = copied
        self._fenced = fenced
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._taken: deque[Job | None] = deque()
        """Taken from there, and to be done before what is there still."""
        self._waiting: dict[PeerPool, Waiting] = {}
        self._pauses = pauses()
        """Between one look at those and the next."""
        self._begun: deque[Callable[[], None]] = deque()
        """How each copy under way is ended, the oldest first."""
        self._given_up: set[str] = set()
        self._thread = Thread(target=self._work, name="diptych-kv-copy", daemon=True)
        self._thread.start()

    def copy(self, source: PeerPool, crossing: Crossing, copy: Copy) -> None:
        self._jobs.put(Asked(source, crossing, copy))

    def fence(self, transfer_id: str) -> None:
        """Copies of the transfer that have not begun are not made; `fenced` comes after those that have."""
        self._given_up.add(transfer_id)
        self._jobs.put(partial(self._behind_all, partial(self._fence, transfer_id)))

    def detach(self, source: PeerPool) -> None:
        """Unmap `source` after all that was asked of it so far."""
        self._jobs.put(partial(self._detach, source))

    def close(self) -> None:
        """Wait for the thread to end; all transfers must have been fenced, and all sources detached."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()
            except Exception:  # a thread that ended here would leave every fence behind it without an answer
                log.exception("a defect in the copy thread")
        for source in self._waiting:
            source.close()

    def _turn(self) -> bool:
        """Do what was asked for; when there is nothing, or enough has begun, end the oldest copies. False when this is the end."""
        self._look_again()
        if self._begun and (len(self._begun) == COPIES_AT_ONCE or not self._more()):
            self._begun.popleft()()
            return True
        try:
            job = self._take()
        except Empty:  # it is time to look again
            return True
        if isinstance(job, Asked):
            self._ask(job.source, self._together(job))
        elif job is not None:
            job()
        return job is not None

    def _more(self) -> bool:
        return bool(self._taken) or not self._jobs.empty()

    def _take(self) -> Job | None:
        """Raises `Empty` if nothing comes before it is time to look at those who wait."""
        return self._taken.popleft() if self._taken else self._jobs.get(timeout=next(self._pauses) if self._waiting else None)

    def _together(self, first: Asked) -> list[Asked]:
        """With `first` what is asked for behind it, of the same pool."""
        found, size = [first], first.bytes
        while self._more():  # nobody else takes from it
            job = self._take()
            if not isinstance(job, Asked) or job.source is not first.source or size + job.bytes > TOGETHER_BYTES:
                self._taken.appendleft(job)
                break
            found.append(job)
            size += job.bytes
        return found

    # -- what is not stored yet ---------------------------------------------------------------------------------------

    def _ask(self, source: PeerPool, asked: list[Asked]) -> None:
        """Begin the copies, or have them wait."""
        wanted = self._wanted(asked)
        if source in self._waiting:
            self._waiting[source].behind += wanted
        elif wanted and not self._decided(source, waiting := Waiting(wanted)):
            self._waiting[source], self._pauses = waiting, pauses()

    def _wanted(self, asked: list[Asked]) -> list[Asked]:
        return [each for each in asked if each.copy.transfer_id not in self._given_up]

    def _look_again(self) -> None:
        for source, waiting in [*self._waiting.items()]:
            if self._decided(source, waiting):
                del self._waiting[source]
                self._taken.extendleft(reversed(waiting.behind))

    def _decided(self, source: PeerPool, waiting: Waiting) -> bool:
        """Whether its pieces wait no longer: they are being copied, or have failed."""
        try:
            if waiting.stored is None:
                waiting.stored = source.stored([each.copy for each in waiting.pieces])
            if not waiting.stored():
                return False
        except Exception as defect:
            log.exception(UNCOPIED, len(waiting.pieces))
            self._fail(waiting.pieces, defect)
        else:
            self._begin(source, self._wanted(waiting.pieces))
        return True

    def _detach(self, source: PeerPool) -> None:
        if source in self._waiting:
            self._waiting[source].behind.append(partial(self._detach, source))
        else:
            self._behind_all(source.close)

    # -- what is ------------------------------------------------------------------------------------------------------

    def _behind_all(self, job: Callable[[], None]) -> None:
        while self._begun:
            self._begun.popleft()()
        job()

    def _begin(self, source: PeerPool, asked: list[Asked]) -> None:
        if not asked:
            return
        try:
            with span(Doing.COPY, who=tuple(each.copy.transfer_id for each in asked)):
                done = source.begin(self._pool, [(each.crossing, each.copy) for each in asked])
        except Exception as defect:
            log.exception(UNCOPIED, len(asked))
            self._not_all(source, asked, defect)
            return
        if done is None:
            self._look(source, asked)
        else:
            self._begun.append(partial(self._end, source, asked, done))

    def _end(self, source: PeerPool, asked: list[Asked], done: Callable[[], None]) -> None:
        try:
            done()
        except Exception as defect:
            log.exception(UNCOPIED, len(asked))
            self._not_all(source, asked, defect)
        else:
            self._look(source, asked)

    def _not_all(self, source: PeerPool, asked: list[Asked], defect: Exception) -> None:
        """One of the pieces could not be copied, whatever it is: it is not there."""
        if len(asked) == 1:
            self._fail(asked, defect)
            return
        for each in asked:
            self._begin(source, [each])

    def _fail(self, asked: list[Asked], defect: Exception) -> None:
        why = f"could not be copied: {type(defect).__name__}: {defect}"
        self._tell([(each.copy, f"Piece {each.copy.seq} {why}") for each in asked])

    def _look(self, source: PeerPool, asked: list[Asked]) -> None:
        """The pieces count, unless the source has given up a transfer meanwhile."""
        found: list[tuple[Copy, str | None]] = []
        for copy in (each.copy for each in asked):
            stands = source.file.word(copy.slot) == copy.word
            found.append((copy, None if stands else f"The source took back the blocks of piece {copy.seq} while they were copied."))
        self._tell(found)

    def _tell(self, found: list[tuple[Copy, str | None]]) -> None:
        self._loop.call_soon_threadsafe(self._told, found)

    def _told(self, found: list[tuple[Copy, str | None]]) -> None:
        for copy, error in found:
            self._copied(copy.transfer_id, copy.seq, error)

    def _fence(self, transfer_id: str) -> None:
        for waiting in self._waiting.values():
            waiting.drop(transfer_id)
        self._given_up.discard(transfer_id)
        self._loop.call_soon_threadsafe(self._fenced, transfer_id)
