"""One-sided transports: the destination copies from the source's pool, then looks whether the source's epoch word still stands.

Here is how a peer's pool is found from the file that it hands out; how it is copied differs (`PeerPool`: `shm`, `cuda_ipc`), and one thread
does it (`copy_thread`).
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ...core.errors import TransferFailed
from ...core.transfer import ShmEndpoint, Transport
from ..actions import Copy
from ..crossing import Crossing
from ..door import ask_at
from ..geometry import NONCE_BYTES, SLOTS, WORD_BYTES
from ..pool import Pool
from ..shared_file import SEALS

ATTACH_S = 4.0
"""Within the destination's handshake (5 s), so that the reason told is this one."""
WAYS = {Transport.SHM: "shared memory", Transport.CUDA_IPC: "CUDA IPC"}
UNREACHABLE = "{worker} cannot be reached by {way} from here ({why}); {transport} is for workers of one host and one user."


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

    def stored(self, asked: Sequence[Copy]) -> Callable[[], bool]:
        """What is returned says whether all that the pieces hold lies there by now. It raises `TransferFailed` of a silent source."""
        ...

    def begin(self, into: Pool, asked: Sequence[tuple[Crossing, Copy]]) -> Callable[[], None] | None:
        """Copy the pieces, which are stored, into the pool; or have them copied, and then what is returned returns when they have been.
        If it raises, so may any of them have: they are asked for again one by one."""
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
