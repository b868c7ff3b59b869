"""The wire between hosts, and wherever there is nothing better: gloo, over TCP.

The kernel copies a piece twice; gloo adds, per piece, the receiver's word that it is ready. A pair has several connections, which pieces
take in turn, each with a thread of gloo's own at either end: with one alone both ends wait for each other at its socket, and reach 0.76 to
0.88 of the rate of gloo without anything around it; two reach 0.91 to 1.07 for the same CPU time (pieces of 1 to 16 MiB, two cores).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import cycle
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore

from .proving import agree, prove
from .rendezvous import ToldStore
from .two_sided import Work

CONNECT_S = 5.0
CONNECTIONS = 2
"""Of a pair. With three of them, each with a thread, two cores did worse than with one: 0.7 to 0.8."""
PIECES, NEVER = 0, 1
"""Tags: that of all pieces, and one on which nothing is ever sent."""
AT_ONCE = timedelta(milliseconds=1)


class GlooWires:
    """`two_sided.Wires`. Where this process's pairs listen: a port that the kernel chooses for each connection of a pair, on the interface
    that has `host`, from the first pair on."""

    connect_s = CONNECT_S

    def __init__(self, host: str) -> None:
        self.host = host
        self._devices: list[Any] = []
        self._making = Lock()

    def wire(self, end: int) -> GlooWire:
        return GlooWire(end, self)

    def devices(self) -> list[Any]:
        """gloo's devices, one for each connection of a pair. Raises `RuntimeError` if no interface has the address."""
        with self._making:
            if not self._devices:
                self._devices = [ProcessGroupGloo.create_device(hostname=self.host, lazy_init=False) for _ in range(CONNECTIONS)]
            return self._devices

    def close(self) -> None:
        """Listen no more, once the last pair has ended."""
        self._devices = []


class GlooWire:
    """`two_sided.Wire`, as process groups of two that know no world. Both ends send and receive in one order, and so by the same turns."""

    def __init__(self, end: int, wires: GlooWires) -> None:
        self._end, self._peer, self._wires = end, 1 - end, wires
        self._groups: list[Any] = []
        self._sending = self._receiving = iter(self._groups)

    def connect(self, store: ToldStore) -> None:
        agree(self._end, store)
        with _in_words():
            for number, device in enumerate(self._wires.devices()):
                self._groups.append(ProcessGroupGloo(PrefixStore(str(number), store), self._end, 2, _options(device)))
        self._sending, self._receiving = cycle(self._groups), cycle(self._groups)
        for _ in self._groups:  # each in its turn, as a stranger may have come to one of them
            prove(self, self._end, store, CONNECT_S)

    def send(self, data: Tensor) -> Work:
        with _in_words():
            return GlooWork(next(self._sending).send([data], self._peer, PIECES))

    def receive(self, data: Tensor) -> Work:
        with _in_words():
            return GlooWork(next(self._receiving).recv([data], self._peer, PIECES))

    def give_up(self) -> None:
        """Its waits end with the store, or by `abort`."""

    def abort(self) -> None:
        """torch's own abort and shutdown leave those waiting who wait for the peer; a wait that times out closes the pair for all."""
        for group in self._groups:
            with suppress(RuntimeError):  # the time-out; or the pair was closed before
                group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, NEVER).wait(AT_ONCE)

    def close(self) -> None:
        """gloo takes 0.1 s to end its threads: not the asyncio thread's."""
        self._groups = []
        self._sending = self._receiving = iter(self._groups)


class GlooWork:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout: timedelta) -> None:
        with _in_words():
            self._work.wait(timeout)


def _options(device: Any) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._devices = [device]
    options._timeout = timedelta(seconds=CONNECT_S)
    options._threads = 1
    return options


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever gloo raises in here is raised as what it says, without where in its sources it says so, and without its advice."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[[^\]]*:\d+\] ", "", str(error)) or type(error).__name__
        raise ConnectionError(text.partition(". This is typically")[0]) from error
