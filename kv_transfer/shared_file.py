"""The file that a pool shows to peers on its host: a memfd, given over a Unix socket (`door`) and mapped read-only there.

It begins with a nonce, by which a peer knows that it is on the same host, and with the epoch words. Of a pool in host memory the KV
follows, of a pool on a GPU the handles by which the GPU's memory is found (`device_memory`). Nothing of it has a name in any directory,
and the kernel takes it back when the last process that maps it has gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets

from ..core.transfer import ShmEndpoint
from .door import Door
from .geometry import NONCE_BYTES, SLOTS, WORD_BYTES

F_SEAL_FUTURE_WRITE = 0x10
"""linux/fcntl.h; Python has no name for it. Mappings made from now on cannot be written: a peer only reads."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
"""Without F_SEAL_SHRINK a peer's reads could end in SIGBUS."""


class SharedFile:
    """`mapped` is what it holds, zeros behind the nonce at first; `fd` its descriptor. At `listener` peers ask for it: when that is
    readable `hand_out` is to be called, on the asyncio thread; it does not block."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("diptych-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self.mapped = mmap.mmap(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._door = Door(self.fd, self._nonce)
        self.listener, self.hand_out = self._door.listener, self._door.answer
        self.mapped[:NONCE_BYTES] = self._nonce
        self._words = memoryview(self.mapped)[NONCE_BYTES : NONCE_BYTES + SLOTS * WORD_BYTES].cast("Q")

    @property
    def endpoint(self) -> ShmEndpoint:
        """What a peer needs to map it. A secret, to be said on lanes alone."""
        return ShmEndpoint(self._door.name, self._nonce)

    def set_word(self, slot: int, word: int) -> None:
        """Set the epoch word of `slot`: one aligned 8-byte store.

        It precedes all that this process writes afterwards, and a reader that copies first and looks at the word then sees either
        no such write or the new word: x86 keeps stores and loads in order, elsewhere the locks both sides take in between do. What a GPU
        writes it is told to write later still.
        """
        self._words[slot] = word

    def word(self, slot: int) -> int:
        """The epoch word of `slot`. Who has read the pool before sees a word that was set before anything he has read was overwritten."""
        return self._words[slot]

    def close(self) -> None:
        """Give it back. Tensors made of `mapped` stay valid: the mapping goes with the last of them."""
        self._door.close()
        self._words.release()
        os.close(self.fd)
        del self.mapped
