"""NCCL as `transports.nccl` uses it, within one process and over memory of the host. It keeps NCCL's rules and notes who breaks them.

What is sent is read, and what is received written, only when both ends have posted it and somebody asks how things stand: as late as a GPU
might. So a slot that is filled too early, or posted out of order, is found by its checksum or its length.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

ASKED_BEFORE_SETTLED = 2
"""How often a call is still in progress when it is asked for."""
ALIGNED = 16
"""NCCL moves so many bytes at a time of what begins at a multiple of them, else one."""


@dataclass(slots=True)
class Posted:
    data: Tensor
    sends: bool
    done: bool = False


@dataclass
class Fabric:
    """What joins the ends. `broken_rules`: what no caller of NCCL may do. `silent`: nothing crosses any more. `error`: NCCL says it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: dict[bytes, FakeCommunicator] = field(default_factory=dict)
    made: list[FakeCommunicator] = field(default_factory=list)
    broken_rules: list[str] = field(default_factory=list)
    silent: bool = False
    error: str | None = None
    bytes_moved: int = 0

    @property
    def alive(self) -> int:
        """Communicators that nobody has aborted."""
        return sum(not communicator.aborted for communicator in self.made)


class FakeNccl:
    """`nccl.Binding`."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def unique_id(self) -> bytes:
        return secrets.token_bytes(128)

    def join(self, unique_id: bytes, end: int) -> FakeCommunicator:
        made = FakeCommunicator(self._fabric, end)
        with self._fabric.lock:
            self._fabric.made.append(made)
            other = self._fabric.waiting.pop(unique_id, None)
            if other is None:
                self._fabric.waiting[unique_id] = made
            else:
                made.other, other.other = other, made
        return made


class FakeCommunicator:
    """`nccl.Communicator`."""

    def __init__(self, fabric: Fabric, end: int) -> None:
        self._fabric, self._end = fabric, end
        self.other: FakeCommunicator | None = None
        self.posted: deque[Posted] = deque()
        self.aborted = False
        self._asked = 0
        self._in_use = threading.Lock()

    def settled(self) -> bool:
        with self._called("settled"):
            if self._fabric.error is not None:
                raise ConnectionError(f"NCCL says: {self._fabric.error}")
            self._asked += 1
            return self.other is not None and self._asked > ASKED_BEFORE_SETTLED

    def send(self, data: Tensor) -> None:
        self._post(data, sends=True)

    def receive(self, data: Tensor) -> None:
        self._post(data, sends=False)

    def mark(self) -> Callable[[], bool]:
        with self._called("mark"):
            before = tuple(self.posted)
        return lambda: self._cross() or all(posted.done for posted in before)

    def probe(self) -> Tensor:
        return torch.full((1,), self._end, dtype=torch.uint8)

    def abort(self) -> None:
        with self._called("abort"), self._fabric.lock:
            self.aborted = True
            self.posted.clear()

    def _post(self, data: Tensor, *, sends: bool) -> None:
        what = "send" if sends else "receive"
        with self._called(what):
            if self._asked <= ASKED_BEFORE_SETTLED:
                self._fabric.broken_rules.append(f"{what} while a call was in progress")
            if data.data_ptr() % ALIGNED:
                self._fabric.broken_rules.append(f"{what} of what is moved byte by byte")
            self._asked = 0
            with self._fabric.lock:
                self.posted.append(Posted(data, sends))

    @contextmanager
    def _called(self, what: str) -> Iterator[None]:
        if self.aborted:
            self._fabric.broken_rules.append(f"{what} after abort")
        if not self._in_use.acquire(blocking=False):
            self._fabric.broken_rules.append(f"{what} while another thread used the communicator")
            self._in_use.acquire()
        try:
            yield
        finally:
            self._in_use.release()

    def _cross(self) -> bool:
        """Move what both ends have posted. False, so that it is asked before what is done."""
        with self._fabric.lock:
            other = self.other
            while not self._fabric.silent and other is not None and self.posted and other.posted:
                ours, theirs = self.posted[0], other.posted[0]
                if ours.sends == theirs.sends or ours.data.shape != theirs.data.shape:
                    self._fabric.broken_rules.append(
                        f"{ours.data.shape} and {theirs.data.shape} met, sends {ours.sends} and {theirs.sends}"
                    )
                source, destination = (ours, theirs) if ours.sends else (theirs, ours)
                destination.data.copy_(source.data)
                self._fabric.bytes_moved += len(source.data)
                for posted in (self.posted.popleft(), other.posted.popleft()):
                    posted.done = True
        return False
