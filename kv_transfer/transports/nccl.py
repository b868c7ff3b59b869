"""The wire between GPUs: NCCL, with a communicator of its own for every pair.

By nccl4py, NVIDIA's bindings, and not by torch's ProcessGroupNCCL: that has a watchdog thread which, when a peer dies, ends the process;
it can be told not to by environment variables alone, which would hold for the model plane's groups too. Here nobody watches but the pair.

A communicator is *nonblocking*: a call may return with the work still in progress, so that no thread is ever stuck in NCCL, and whoever
waits for a peer can be told to give up. The state is asked for until it is settled. What was sent or received is known by an event behind
it on the wire's stream. Both are polled: there is nothing in CUDA that one can wait for with a time limit.

The unique id is said on the lane. Which interface NCCL listens on, and how it crosses, are NCCL's own settings (`NCCL_SOCKET_IFNAME`, …).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from threading import Event, Lock
from time import monotonic, sleep
from typing import Protocol, TypeVar

from torch import Tensor
from torch.distributed.distributed_c10d import Store

from ..cuda_streams import pauses
from .two_sided import SOURCE, Work

CONNECT_S = 30.0
"""The first communicator of a process takes seconds: NCCL looks the machine over."""
READY, UNIQUE_ID = "nccl ready", "nccl"
LOOKS = 10
"""In a row, whether a call has settled, before the first pause: NCCL makes every send and receive on a thread of its own, in less time than
the shortest pause takes."""
R = TypeVar("R")


class Communicator(Protocol):
    """One of two ends. `ConnectionError` in NCCL's words from whatever goes wrong."""

    def settled(self) -> bool:
        """Whether no call is in progress any more; only then may the next be made."""
        ...

    def send(self, data: Tensor) -> None:
        """To the other end, after what was sent or received before."""
        ...

    def receive(self, data: Tensor) -> None: ...

    def mark(self) -> Callable[[], bool]:
        """Tells whether all that was asked for until now is done."""
        ...

    def probe(self) -> Tensor:
        """A byte of its own, to send or receive."""
        ...

    def abort(self) -> None:
        """End what is under way, and the communicator: no method may be called after, nor while this one runs."""
        ...


class Binding(Protocol):
    """NCCL as a rank has it."""

    def unique_id(self) -> bytes: ...

    def join(self, unique_id: bytes, end: int) -> Communicator:
        """Begin to make the communicator that both ends join by this id."""
        ...


class NcclWires:
    """`two_sided.Wires`."""

    connect_s = CONNECT_S

    def __init__(self, host: str, binding: Binding) -> None:
        self.host = host
        self._binding = binding

    def wire(self, end: int) -> NcclWire:
        return NcclWire(end, self._binding)

    def close(self) -> None:
        """Each communicator went with its wire."""


class NcclWire:
    """`two_sided.Wire`."""

    def __init__(self, end: int, binding: Binding) -> None:
        self._end, self._binding = end, binding
        self._given_up = Event()
        self._communicator: Communicator | None = None
        self._using = Lock()
        """Held while the communicator is used: nobody may while it is aborted."""

    def connect(self, store: Store) -> None:
        """A byte crosses too: NCCL makes the connections of a pair when something is first sent. The id is made when the destination is
        ready to join: for each NCCL listens, on a thread and a socket of its own, until both ends have."""
        source = self._end == SOURCE
        if not source:
            store.set(READY, "")
        else:
            store.get(READY)
            store.set(UNIQUE_ID, self._binding.unique_id().hex())
        self._communicator = self._binding.join(bytes.fromhex(store.get(UNIQUE_ID).decode()), self._end)
        self._settle()
        probe = self._communicator.probe()
        (self.send if source else self.receive)(probe).wait(timedelta(seconds=CONNECT_S))

    def send(self, data: Tensor) -> Work:
        return self._ask(lambda communicator: communicator.send(data))

    def receive(self, data: Tensor) -> Work:
        return self._ask(lambda communicator: communicator.receive(data))

    def give_up(self) -> None:
        self._given_up.set()

    def abort(self) -> None:
        with self._using:
            communicator, self._communicator = self._communicator, None
            if communicator is not None:
                communicator.abort()

    def close(self) -> None:
        """Nothing is left after `abort`."""

    def until(self, done: Callable[[], bool], seconds: float) -> None:
        """Returns when `done`, while all is well with the communicator."""
        deadline = monotonic() + seconds
        for pause in pauses():
            if done():
                return
            if self._given_up.wait(pause):
                raise ConnectionError("it was given up")
            self._use(lambda communicator: communicator.settled())
            if monotonic() > deadline:
                raise ConnectionError(f"Timed out: the other end neither gave nor took anything for {seconds:g} s.")

    def _ask(self, what: Callable[[Communicator], None]) -> NcclWork:
        self._use(what)
        self._settle()
        return NcclWork(self, self._use(lambda communicator: communicator.mark()))

    def _settle(self) -> None:
        for _ in range(LOOKS):
            if self._use(lambda communicator: communicator.settled()):
                return
            sleep(0)
        self.until(lambda: self._use(lambda communicator: communicator.settled()), CONNECT_S)

    def _use(self, what: Callable[[Communicator], R]) -> R:
        with self._using:
            if self._communicator is None:
                raise ConnectionError("it was given up")
            return what(self._communicator)


class NcclWork:
    """`two_sided.Work`: something that was sent or received."""

    def __init__(self, wire: NcclWire, done: Callable[[], bool]) -> None:
        self._wire, self._done = wire, done

    def wait(self, timeout: timedelta) -> None:
        self._wire.until(self._done, timeout.total_seconds())
