"""Shared memory between two processes of one host: the destination copies from the source's pool, which it maps.

One thread copies, in the order it is asked, so that a fence is simply the next thing in its queue.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import socket
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread

from ...core.errors import TransferFailed
from ...core.layout import Layout
from ...core.transfer import ShmEndpoint
from ..actions import Copy
from ..crossing import Crossing
from ..geometry import NONCE_BYTES, SLOTS, WORD_BYTES, Geometry
from ..memory import address_of, cast_runs, copy_runs
from ..pool import DTYPES, Pool
from ..shared_file import SEALS

log = logging.getLogger(__name__)

ATTACH_S = 4.0
"""Within the destination's handshake (5 s), so that the reason told is this one."""
UNREACHABLE = "{worker} cannot be reached by shared memory from here ({why}); shm is for workers of one host and one user."


class PeerPool:
    """The pool of a rank of another worker, mapped read-only."""

    def __init__(self, layout: Layout, mapped: mmap.mmap) -> None:
        self.geometry = Geometry(layout)
        self.address = address_of(mapped)
        self._mapped = mapped
        self._words = memoryview(mapped)[NONCE_BYTES : NONCE_BYTES + SLOTS * WORD_BYTES].cast("Q")

    def word(self, slot: int) -> int:
        return self._words[slot]

    def close(self) -> None:
        self._words.release()
        self._mapped.close()


async def attach(worker_id: str, endpoint: ShmEndpoint, layout: Layout) -> PeerPool:
    """Map a pool of `worker_id`, whose own layout is `layout`. Raises `TransferFailed` unless the nonce is read there within `ATTACH_S`
    seconds."""
    try:
        async with asyncio.timeout(ATTACH_S):
            fd = await _ask_for_fd(endpoint.socket)
        try:
            return _map(fd, endpoint.nonce, layout)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise TransferFailed(UNREACHABLE.format(worker=worker_id, why=str(error) or type(error).__name__)) from error


async def _ask_for_fd(name: str) -> int:
    """The file descriptor that the abstract socket `name` hands out."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as connection:
        await loop.sock_connect(connection, f"\0{name}")
        readable = asyncio.Event()
        loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection)
        _, fds, _, _ = socket.recv_fds(connection, 1, 1, flags=socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise ValueError("it hands out nothing, perhaps because it is another user's")
    return fds[0]


def _map(fd: int, nonce: bytes, layout: Layout) -> PeerPool:
    """`ValueError` unless the memory is a pool of `layout` that cannot shrink and begins with `nonce`."""
    size = Geometry(layout).size
    if os.fstat(fd).st_size != size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise ValueError("what it hands out is no pool of its layout")
    mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    if mapped[:NONCE_BYTES] != nonce:
        mapped.close()
        raise ValueError("the nonce there is another's")
    return PeerPool(layout, mapped)


class ShmCopies:
    """The copy thread. `copied(transfer_id, seq, error or None)` and `fenced(transfer_id)` are called on the asyncio thread."""

    def __init__(self, pool: Pool, copied: Callable[[str, int, str | None], None], fenced: Callable[[str], None]) -> None:
        self._pool = pool
        self._copied = copied
        self._fenced = fenced
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._given_up: set[str] = set()
        self._thread = Thread(target=self._work, name="diptych-kv-copy", daemon=True)
        self._thread.start()

    def copy(self, source: PeerPool, crossing: Crossing, copy: Copy) -> None:
        self._jobs.put(partial(self._copy, source, crossing, copy))

    def fence(self, transfer_id: str) -> None:
        """Copies of the transfer that have not begun are not made; `fenced` comes after the one that has."""
        self._given_up.add(transfer_id)
        self._jobs.put(partial(self._fence, transfer_id))

    def detach(self, source: PeerPool) -> None:
        """Unmap `source` after all that was asked for so far."""
        self._jobs.put(source.close)

    def close(self) -> None:
        """Wait for the thread to end; all transfers must have been fenced."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a thread that ended here would leave every fence behind it without an answer
                log.exception("a defect in the copy thread")

    def _copy(self, source: PeerPool, crossing: Crossing, copy: Copy) -> None:
        if copy.transfer_id in self._given_up:
            return
        try:
            error = self._copied_wrong(source, crossing, copy)
        except Exception as defect:  # whatever it is, this piece is not there
            log.exception("piece %d of transfer %s could not be copied", copy.seq, copy.transfer_id)
            error = f"Piece {copy.seq} could not be copied: {type(defect).__name__}: {defect}"
        self._loop.call_soon_threadsafe(self._copied, copy.transfer_id, copy.seq, error)

    def _copied_wrong(self, source: PeerPool, crossing: Crossing, copy: Copy) -> str | None:
        """Copy the piece; why it does not count, or None if it does."""
        span = copy.span
        found = crossing.between(span, copy.source_blocks, copy.destination_blocks)
        reads, writes = (DTYPES[places[span.group].dtype] for places in (crossing.sources, crossing.destinations))
        for layer in span.layers:
            here, there = source.address + source.geometry.offsets[layer], self._pool.address + self._pool.geometry.offsets[layer]
            if reads is writes:
                copy_runs(here, there, found)
            else:
                cast_runs(here, reads, there, writes, found)
        stands = source.word(copy.slot) == copy.word
        return None if stands else f"The source took back the blocks of piece {copy.seq} while they were copied."

    def _fence(self, transfer_id: str) -> None:
        self._given_up.discard(transfer_id)
        self._loop.call_soon_threadsafe(self._fenced, transfer_id)
