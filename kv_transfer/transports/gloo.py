"""gloo between two processes, over TCP: the source sends each piece that it has announced, the destination receives it.

A pair has one queue and two threads at each end: one prepares and posts, one waits for what was posted, in order. Between hosts the
kernel copies a piece twice; gloo adds its own thread per process and, per piece, the receiver's word that it is ready.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work

from ..actions import Receive, Stage
from ..crossing import Crossing
from ..packing import checksum, pack, unpack
from ..pool import Pool
from ..staging import SLOTS_PER_PAIR
from .rendezvous import ToldStore

log = logging.getLogger(__name__)

CONNECT_S = 5.0
"""Longest time for both ends to find each other and connect."""
SOURCE, DESTINATION = 0, 1
"""Ranks of a pair."""
PIECES, NEVER = 0, 1
"""Tags: that of all pieces, and one on which nothing is ever sent."""
AT_ONCE = timedelta(milliseconds=1)


class Device:
    """Where this process's pairs listen: one port that the kernel chooses, on the interface that has `host`, from the first pair on."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._device: Any = None
        self._making = Lock()

    def get(self) -> Any:
        """gloo's device. Raises `RuntimeError` if no interface has the address."""
        with self._making:
            if self._device is None:
                self._device = ProcessGroupGloo.create_device(hostname=self.host, lazy_init=False)
            return self._device

    def close(self) -> None:
        """Listen no more, once the last pair has ended."""
        self._device = None


@dataclass(frozen=True, slots=True)
class Ground:
    """What one end of a route's pair stands on. `slot_bytes`: the length of a staging slot, equal at both ends."""

    pool: Pool
    device: Device
    crossing: Crossing
    slot_bytes: int
    silence_s: float
    """A peer that neither takes nor gives what was announced for so long is lost."""


@dataclass(frozen=True, slots=True)
class PairEvents:
    """What a pair tells its rank, on the asyncio thread. After `broken` nothing more is told."""

    broken: Callable[[str], None]
    say: Callable[[str, bytes], None]
    """To its other end, which shall be introduced to it."""
    connected: Callable[[], None] = lambda: None
    staged: Callable[[int, int], None] = lambda slot, checksum: None
    sent: Callable[[int], None] = lambda slot: None
    copied: Callable[[str, int, str | None], None] = lambda transfer_id, seq, error: None
    fenced: Callable[[str], None] = lambda transfer_id: None


class Pair:
    """One end of a pair, its staging slots and its threads. Public methods are called on the asyncio thread and return at once."""

    def __init__(self, rank: int, ground: Ground, events: PairEvents) -> None:
        """Begins to connect."""
        self._pool, self._crossing, self._events, self._host = ground.pool, ground.crossing, events, ground.device.host
        self._peer = 1 - rank
        self._silence = timedelta(seconds=ground.silence_s)
        self._loop = asyncio.get_running_loop()
        self._store = ToldStore(lambda key, value: self._call_soon(events.say, key, value), CONNECT_S)
        self._slots = torch.empty(SLOTS_PER_PAIR, ground.slot_bytes, dtype=torch.uint8)
        self._group: Any = None
        self._lost = False
        self._ended = asyncio.Event()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._posted: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._waiter = Thread(target=self._work, args=(self._posted,), name="diptych-gloo-wait", daemon=True)
        self._poster = Thread(target=self._run, args=(rank, ground.device), name="diptych-gloo-post", daemon=True)
        self._poster.start()

    def introduce(self, key: str, value: bytes) -> None:
        self._store.heard(key, value)

    def close(self) -> None:
        """Give everything up. The connection ends, which the peer notices."""
        self._lose()
        self._jobs.put(None)

    async def wait_closed(self) -> None:
        """After `close`: returns when both threads have ended."""
        await self._ended.wait()
        self._poster.join()

    def _lose(self) -> None:
        """From here on nothing is told and no job is begun. From any thread."""
        self._lost = True
        self._store.close()

    def _call_soon(self, call: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    def _tell(self, event: Callable[..., None], *arguments: object) -> None:
        self._call_soon(self._tell_unless_lost, event, arguments)

    def _tell_unless_lost(self, event: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if not self._lost:
            event(*arguments)

    # -- on the poster's thread ---------------------------------------------------------------------------------------

    def _run(self, rank: int, device: Device) -> None:
        self._waiter.start()
        self._guarded(partial(self._connect, rank, device))
        self._work(self._jobs)
        self._wake_waiter()
        self._posted.put(None)
        self._waiter.join()
        self._group = None  # gloo takes 0.1 s to end its threads: not the asyncio thread's
        self._call_soon(self._ended.set)

    def _connect(self, rank: int, device: Device) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices = [device.get()]
        options._timeout = timedelta(seconds=CONNECT_S)
        options._threads = 1
        self._group = ProcessGroupGloo(self._store, rank, 2, options)
        self._tell(self._events.connected)

    def _wake_waiter(self) -> None:
        """torch's own abort and shutdown leave those waiting who wait for the peer; a wait that times out closes the pair for all."""
        if self._group is not None:
            with suppress(RuntimeError):  # the time-out; or the pair was closed before
                self._group.recv([self._slots[0][:1]], self._peer, NEVER).wait(AT_ONCE)

    # -- on both threads ----------------------------------------------------------------------------------------------

    def _work(self, jobs: SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            self._guarded(job)

    def _guarded(self, job: Callable[[], None]) -> None:
        if self._lost:
            return
        try:
            job()
        except Exception as error:  # whatever it is, the two ends are out of step from here on
            log.debug("a gloo pair is lost", exc_info=error)
            self._call_soon(self._broke, _words(error))

    def _broke(self, reason: str) -> None:
        if not self._lost:
            self._lose()
            self._events.broken(f"The gloo pair of {self._host} is lost: {reason}")


class Outgoing(Pair):
    """The source's end."""

    def __init__(self, ground: Ground, events: PairEvents) -> None:
        super().__init__(SOURCE, ground, events)
        self._lengths = [0] * SLOTS_PER_PAIR

    def stage(self, stage: Stage) -> None:
        """Fill the slot; `staged(slot, checksum)` follows."""
        self._jobs.put(partial(self._fill, stage))

    def post(self, slot: int) -> None:
        """Send what the slot holds; `sent(slot)` follows."""
        self._jobs.put(partial(self._send, slot))

    def _fill(self, stage: Stage) -> None:
        slot = self._slots[stage.slot]
        pack(self._pool, self._crossing, stage.span, stage.blocks, slot)
        self._lengths[stage.slot] = length = self._crossing.bytes(stage.span)
        self._tell(self._events.staged, stage.slot, checksum(slot, length))

    def _send(self, slot: int) -> None:
        work = self._group.send([self._slots[slot][: self._lengths[slot]]], self._peer, PIECES)
        self._posted.put(partial(self._wait, work, slot))

    def _wait(self, work: Work, slot: int) -> None:
        work.wait(self._silence)
        self._tell(self._events.sent, slot)


class Incoming(Pair):
    """The destination's end."""

    def __init__(self, ground: Ground, events: PairEvents) -> None:
        self._free: SimpleQueue[int | None] = SimpleQueue()
        for slot in range(SLOTS_PER_PAIR):
            self._free.put(slot)
        self._lock = Lock()
        self._given_up: set[str] = set()
        self._unpacking: str | None = None
        super().__init__(DESTINATION, ground, events)

    def receive(self, receive: Receive) -> None:
        """Take the next piece; `copied` follows if it was not to be dropped."""
        self._jobs.put(partial(self._post, receive))

    def fence(self, transfer_id: str) -> None:
        """What has come of the transfer and is not in the pool yet will not be put there. `fenced` follows whatever becomes of the pair:
        it waits for no peer, only for one copy that may be under way."""
        with self._lock:
            self._given_up.add(transfer_id)
            if self._unpacking != transfer_id:
                self._loop.call_soon(self._events.fenced, transfer_id)
        self._jobs.put(lambda: self._posted.put(partial(self._given_up.discard, transfer_id)))

    def _lose(self) -> None:
        super()._lose()
        self._free.put(None)

    def _post(self, receive: Receive) -> None:
        slot = self._free.get()
        if slot is None:
            return
        length = self._crossing.bytes(receive.span)
        work = self._group.recv([self._slots[slot][:length]], self._peer, PIECES)
        self._posted.put(partial(self._wait, work, slot, length, receive))

    def _wait(self, work: Work, slot: int, length: int, receive: Receive) -> None:
        work.wait(self._silence)
        if receive.blocks is not None:
            self._take(receive, receive.blocks, self._slots[slot], length)
        self._free.put(slot)

    def _take(self, receive: Receive, blocks: tuple[int, ...], slot: Tensor, length: int) -> None:
        if checksum(slot, length) != receive.checksum:
            self._tell(self._events.copied, receive.transfer_id, receive.seq, f"The checksum of piece {receive.seq} is wrong.")
            return
        with self._lock:
            if receive.transfer_id in self._given_up:
                return
            self._unpacking = receive.transfer_id
        unpack(self._pool, self._crossing, receive.span, blocks, slot)
        with self._lock:
            self._unpacking = None
            if receive.transfer_id in self._given_up:
                self._call_soon(self._events.fenced, receive.transfer_id)
                return
        self._tell(self._events.copied, receive.transfer_id, receive.seq, None)


def _words(error: Exception) -> str:
    """What gloo says, without where in its sources it says so, and without its advice."""
    text = re.sub(r"^\[[^\]]*:\d+\] ", "", str(error)) or type(error).__name__
    return text.partition(". This is typically")[0]
