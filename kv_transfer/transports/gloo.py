"""The wire between hosts, and wherever there is nothing better: gloo, over TCP.

The kernel copies a piece twice; gloo adds its own thread per process and, per piece, the receiver's word that it is ready.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from .proving import agree, prove
from .rendezvous import ToldStore
from .two_sided import Work

CONNECT_S = 5.0
PIECES, NEVER = 0, 1
"""Tags: that of all pieces, and one on which nothing is ever sent."""
AT_ONCE = timedelta(milliseconds=1)


class Device:
    """`two_sided.Wires`. Where this process's pairs listen: one port that the kernel chooses, on the interface that has `host`, from the
    first pair on."""

    connect_s = CONNECT_S

    def __init__(self, host: str) -> None:
        self.host = host
        self._device: Any = None
        self._making = Lock()

    def wire(self, end: int) -> GlooWire:
        return GlooWire(end, self)

    def get(self) -> Any:
        """gloo's device. Raises `RuntimeError` if no interface has the address."""
        with self._making:
            if self._device is None:
                self._device = ProcessGroupGloo.create_device(hostname=self.host, lazy_init=False)
            return self._device

    def close(self) -> None:
        """Listen no more, once the last pair has ended."""
        self._device = None


class GlooWire:
    """`two_sided.Wire`, as a process group of two that knows no world."""

    def __init__(self, end: int, device: Device) -> None:
        self._end, self._peer, self._device = end, 1 - end, device
        self._group: Any = None

    def connect(self, store: ToldStore) -> None:
        agree(self._end, store)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        with _in_words():
            options._devices = [self._device.get()]
            options._timeout = timedelta(seconds=CONNECT_S)
            options._threads = 1
            self._group = ProcessGroupGloo(store, self._end, 2, options)
        prove(self, self._end, store, CONNECT_S)

    def send(self, data: Tensor) -> Work:
        with _in_words():
            return GlooWork(self._group.send([data], self._peer, PIECES))

    def receive(self, data: Tensor) -> Work:
        with _in_words():
            return GlooWork(self._group.recv([data], self._peer, PIECES))

    def give_up(self) -> None:
        """Its waits end with the store, or by `abort`."""

    def abort(self) -> None:
        """torch's own abort and shutdown leave those waiting who wait for the peer; a wait that times out closes the pair for all."""
        if self._group is not None:
            with suppress(RuntimeError):  # the time-out; or the pair was closed before
                self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, NEVER).wait(AT_ONCE)

    def close(self) -> None:
        """gloo takes 0.1 s to end its threads: not the asyncio thread's."""
        self._group = None


class GlooWork:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout: timedelta) -> None:
        with _in_words():
            self._work.wait(timeout)


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever gloo raises in here is raised as what it says, without where in its sources it says so, and without its advice."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[[^\]]*:\d+\] ", "", str(error)) or type(error).__name__
        raise ConnectionError(text.partition(". This is typically")[0]) from error
