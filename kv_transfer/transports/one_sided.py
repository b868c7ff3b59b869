"""One-sided transports: the destination copies from the source's pool, then looks whether the source's epoch word still stands.

What differs is below: how a peer's pool is found from the file that it hands out, and how it is copied (`PeerPool`: `shm`, `cuda_ipc`).
One thread copies, in the order it is asked, so that a fence is simply the next thing in its queue.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

from ...core.errors import TransferFailed
from ...core.recordings import Doing
from ...core.spans import span
from ...core.transfer import ShmEndpoint, Transport
from ..actions import Copy
from ..crossing import Crossing
from ..door import ask_at
from ..geometry import NONCE_BYTES, SLOTS, WORD_BYTES
from ..pool import Pool
from ..shared_file import SEALS

log = logging.getLogger(__name__)

ATTACH_S = 4.0
"""Within the destination's handshake (5 s), so that the reason told is this one."""
WAYS = {Transport.SHM: "shared memory", Transport.CUDA_IPC: "CUDA IPC"}
UNREACHABLE = "{worker} cannot be reached by {way} from here ({why}); {transport} is for workers of one host and one user."
UNCOPIED = "%d pieces, from %d of transfer %s on, could not be copied"
TOGETHER_BYTES = 16 << 20
"""Pieces that wait are copied in one go, up to so much: 1 ms, the longest a fence waits. Each go needs the interpreter, which the asyncio
thread has for 70 µs at a time, as long as 1 MiB takes."""
COPIES_AT_ONCE = 4
"""Begun and not yet looked at: on a GPU the next ones are asked for while one runs, so that it never waits for the host."""


class PeerFile:
    """The file that the pool of a rank of another worker hands out, mapped read-only."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self._words = memoryview(mapped)[NONCE_BYTES : NONCE_BYTES + SLOTS * WORD_BYTES].cast("Q")

    def word(self, slot: int) -> int:
        return self._words[slot]

    def close(self) -> None:
        self._words.release()
        self.mapped.close()


class PeerPool(Protocol):
    """The pool of a rank of another worker, as this process reaches it."""

    file: PeerFile

    def begin(self, into: Pool, asked: Sequence[tuple[Crossing, Copy]]) -> Callable[[], None] | None:
        """Copy the pieces into the pool; or have them copied, and then what is returned returns when they have been. If it raises, so
        may any of them have: they are asked for again one by one."""
        ...

    def close(self) -> None: ...


P = TypeVar("P", bound=PeerPool)


def unreachable(transport: Transport, worker_id: str, error: Exception) -> TransferFailed:
    why = str(error) or type(error).__name__
    return TransferFailed(UNREACHABLE.format(worker=worker_id, way=WAYS[transport], why=why, transport=transport))


async def attach(transport: Transport, worker_id: str, endpoint: ShmEndpoint, make: Callable[[PeerFile], P], size: int) -> P:
    """What `make` makes of the file, `size` bytes long, that a pool of `worker_id` hands out. Raises `TransferFailed` unless the nonce is
    read there within `ATTACH_S` seconds, or if `make` does."""
    try:
        async with asyncio.timeout(ATTACH_S):
            fd = await ask_at(endpoint.socket, endpoint.nonce)
        try:
            file = _map(fd, endpoint.nonce, size)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise unreachable(transport, worker_id, error) from error
    try:
        return make(file)
    except BaseException:
        file.close()
        raise


def _map(fd: int, nonce: bytes, size: int) -> PeerFile:
    """`ValueError` unless it is `size` bytes that cannot shrink and begin with `nonce`."""
    if os.fstat(fd).st_size != size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise ValueError("what it hands out is no pool of its layout")
    mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    if mapped[:NONCE_BYTES] != nonce:
        mapped.close()
        raise ValueError("the nonce there is another's")
    return PeerFile(mapped)


@dataclass(frozen=True, slots=True)
class Asked:
    """One piece to copy."""

    source: PeerPool
    crossing: Crossing
    copy: Copy

    @property
    def bytes(self) -> int:
        return self.crossing.bytes(self.copy.span)


class Copies:
    """The copy thread. `copied(transfer_id, seq, error or None)` and `fenced(transfer_id)` are called on the asyncio thread."""

    def __init__(self, pool: Pool, copied: Callable[[str, int, str | None], None], fenced: Callable[[str], None]) -> None:
        self._pool = pool
        self._copied = copied
        self._fenced = fenced
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Asked | Callable[[], None] | None] = SimpleQueue()
        self._taken: deque[Asked | Callable[[], None] | None] = deque()
        """Taken from there, and not to be done together with what was taken before it."""
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
        """Unmap `source` after all that was asked for so far."""
        self._jobs.put(partial(self._behind_all, source.close))

    def close(self) -> None:
        """Wait for the thread to end; all transfers must have been fenced."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if not isinstance(job, Asked):
                    job()
                elif wanted := [each for each in self._together(job) if each.copy.transfer_id not in self._given_up]:
                    self._begin(job.source, wanted)
            except Exception:  # a thread that ended here would leave every fence behind it without an answer
                log.exception("a defect in the copy thread")

    def _next(self) -> Asked | Callable[[], None] | None:
        """What was asked for; when there is nothing, or enough has begun, the end of the oldest copies."""
        if self._begun and (len(self._begun) == COPIES_AT_ONCE or (self._jobs.empty() and not self._taken)):
            return self._begun.popleft()
        return self._taken.popleft() if self._taken else self._jobs.get()

    def _together(self, first: Asked) -> list[Asked]:
        """With `first` what waits behind it, of the same pool."""
        found, size = [first], first.bytes
        while not self._jobs.empty():  # nobody else takes from it
            job = self._jobs.get()
            if not isinstance(job, Asked) or job.source is not first.source or size + job.bytes > TOGETHER_BYTES:
                self._taken.append(job)
                break
            found.append(job)
            size += job.bytes
        return found

    def _behind_all(self, job: Callable[[], None]) -> None:
        while self._begun:
            self._begun.popleft()()
        job()

    def _begin(self, source: PeerPool, asked: list[Asked]) -> None:
        try:
            with span(Doing.COPY, who=tuple(each.copy.transfer_id for each in asked)):
                done = source.begin(self._pool, [(each.crossing, each.copy) for each in asked])
        except Exception as defect:
            log.exception(UNCOPIED, len(asked), asked[0].copy.seq, asked[0].copy.transfer_id)
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
            log.exception(UNCOPIED, len(asked), asked[0].copy.seq, asked[0].copy.transfer_id)
            self._not_all(source, asked, defect)
        else:
            self._look(source, asked)

    def _not_all(self, source: PeerPool, asked: list[Asked], defect: Exception) -> None:
        """One of the pieces could not be copied, whatever it is: it is not there."""
        if len(asked) > 1:
            for each in asked:
                self._begin(source, [each])
            return
        copy = asked[0].copy
        self._tell([(copy, f"Piece {copy.seq} could not be copied: {type(defect).__name__}: {defect}")])

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
        self._given_up.discard(transfer_id)
        self._loop.call_soon_threadsafe(self._fenced, transfer_id)
