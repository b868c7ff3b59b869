"""A pool's bytes in host memory: the shared file itself, which a peer on the same host maps and copies from."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from ..core.errors import ConfigError
from .memory import address_of, take_pages
from .shared_file import SharedFile

PAGES_AT_ONCE = 256 << 10
"""Bytes per call: 0.1 to 1 ms here, for which the process cannot map or unmap."""

CROWDED_S = 0.05
"""How long to wait when more threads want to run than there are cores. At full speed a pool of 590 MB per worker on two cores tripled the
TTFT of the first request (166 to 480 ms), at nice 19 as well, which counts within a session alone. With a pause nine times as long after
each call it took 12 s, in which prompts of 256 tokens took 320 ms for 256, as the two threads that compute them wait for each other
at every product."""

LOAD = Path("/proc/loadavg")


class HostMemory:
    """`kv_transfer.pool.Memory`. Its pages are taken in the background, since the first touch of a page costs ten times its copy (here
    0.25 against 15 GB/s)."""

    def __init__(self, size: int) -> None:
        """Raises `ConfigError` (field `kv_tokens`) if the host has not that much memory available."""
        _check_available(size)
        self.shared = SharedFile(size)
        self.whole = torch.frombuffer(self.shared.mapped, dtype=torch.uint8)
        self._size = size
        self._address = address_of(self.shared.mapped)
        self._closing = threading.Event()
        self._pages = threading.Thread(target=self._take_pages, name="diptych-kv-pages", daemon=True)
        self._pages.start()

    def stored(self, layer: int) -> None:
        """What is stored in host memory is there when the store has returned."""

    def await_stored(self, layer: int) -> None:
        """It is there."""

    def close(self) -> None:
        self._closing.set()
        self._pages.join()
        del self.whole
        self.shared.close()

    def _take_pages(self) -> None:
        for start in range(0, self._size, PAGES_AT_ONCE):
            while _crowded():
                if self._closing.wait(CROWDED_S):
                    return
            if self._closing.is_set() or not take_pages(self._address + start, min(PAGES_AT_ONCE, self._size - start)):
                return


def _crowded() -> bool:
    """Whether more threads want to run, this one among them, than the host has cores."""
    running, _, _ = LOAD.read_text().split()[3].partition("/")
    return int(running) > (os.cpu_count() or 1)


def _check_available(size: int) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable" and size > (available := int(amount.split()[0]) << 10):
            raise ConfigError(
                f"The KV pool needs {size >> 20} MiB and the host has {available >> 20} MiB available; lower kv_tokens.", field="kv_tokens"
            )
