"""The bytes of a worker's KV pool: one memfd, which a peer on the same host is given over a Unix socket and maps read-only.

Nothing of it has a name in any directory, and the kernel takes it back when the last process that maps it has gone.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.layout import DType, Layout
from ..core.transfer import ShmEndpoint
from .geometry import NONCE_BYTES, SLOTS, WORD_BYTES, Geometry
from .memory import address_of, take_pages

log = logging.getLogger(__name__)

F_SEAL_FUTURE_WRITE = 0x10
"""linux/fcntl.h; Python has no name for it. Mappings made from now on cannot be written: a peer only reads."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
"""Without F_SEAL_SHRINK a peer's reads could end in SIGBUS."""
PAGES_AT_ONCE = 4 << 20
BACKLOG = 64
DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


class Pool:
    """`caches[g][i]` is `[num_blocks[g], kv_heads, 2, block_size, head_dim]` of layer `layout.groups[g].layers[i]`, zeros at first.

    Use `allocate`. `address` is where the pool begins in this process; `geometry` says what lies where.
    """

    def __init__(self, layout: Layout, fd: int, mapped: mmap.mmap, listener: socket.socket) -> None:
        self.layout = layout
        self.geometry = Geometry(layout)
        self.listener = listener
        self.address = address_of(mapped)
        self._fd = fd
        self._mapped = mapped
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        mapped[:NONCE_BYTES] = self._nonce
        self._words = memoryview(mapped)[NONCE_BYTES : NONCE_BYTES + SLOTS * WORD_BYTES].cast("Q")
        self.caches = _views(layout, self.geometry, mapped)
        self._closing = threading.Event()
        self._pages = threading.Thread(target=self._take_pages, name="diptych-kv-pages", daemon=True)
        self._pages.start()

    @classmethod
    def allocate(cls, layout: Layout) -> Pool:
        """A new pool. Its pages are taken in the background, since the first touch of a page costs ten times its copy (here 0.25
        against 15 GB/s). Raises `ConfigError` (field `kv_tokens`) if the host has not that much memory available."""
        size = Geometry(layout).size
        _check_memory(size)
        fd = os.memfd_create("diptych-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        mapped = mmap.mmap(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return cls(layout, fd, mapped, _listen())

    @property
    def endpoint(self) -> ShmEndpoint:
        """What a peer needs to map this pool; `hand_out` must be called when `listener` is readable."""
        return ShmEndpoint(self.listener.getsockname()[1:].decode(), self._nonce)

    def set_word(self, slot: int, word: int) -> None:
        """Set the epoch word of `slot`: one aligned 8-byte store.

        It precedes all that this process writes afterwards, and a reader that copies first and looks at the word then sees either
        no such write or the new word: x86 keeps stores and loads in order, elsewhere the locks both sides take in between do.
        """
        self._words[slot] = word

    def hand_out(self) -> None:
        """Give the memfd to one process that has connected; it must be of the same user. Does not block."""
        try:
            connection, _ = self.listener.accept()
            with connection:
                _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
                if uid == os.getuid():
                    socket.send_fds(connection, [b"\0"], [self._fd], flags=socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            log.info("a process asked for the pool and went away: %s", error)

    def close(self) -> None:
        """Give the memory back. Tensors of `caches` held elsewhere stay valid: the mapping goes with the last of them."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._pages.join()
        self.listener.close()
        self.caches.clear()
        self._words.release()
        os.close(self._fd)
        del self._mapped

    def _take_pages(self) -> None:
        for start in range(0, self.geometry.size, PAGES_AT_ONCE):
            length = min(PAGES_AT_ONCE, self.geometry.size - start)
            if self._closing.is_set() or not take_pages(self.address + start, length):
                return


def _views(layout: Layout, geometry: Geometry, mapped: mmap.mmap) -> list[list[Tensor]]:
    caches: list[list[Tensor]] = []
    for group, blocks in zip(layout.groups, layout.num_blocks, strict=True):
        shape = (blocks, group.kv_heads, 2, layout.block_size, group.head_dim)
        count = blocks * layout.block_size * group.token_bytes // group.dtype.itemsize
        views = [torch.frombuffer(mapped, dtype=DTYPES[group.dtype], count=count, offset=geometry.offsets[layer]) for layer in group.layers]
        caches.append([view.view(shape) for view in views])
    return caches


def _listen() -> socket.socket:
    """An abstract Unix socket: it has no file, and goes with the process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.bind(f"\0diptych-kv-{secrets.token_hex(16)}")
    listener.listen(BACKLOG)
    return listener


def _check_memory(size: int) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable" and size > (available := int(amount.split()[0]) << 10):
            raise ConfigError(
                f"The KV pool needs {size >> 20} MiB and the host has {available >> 20} MiB available; lower kv_tokens.", field="kv_tokens"
            )
