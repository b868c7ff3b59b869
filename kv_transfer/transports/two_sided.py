"""Two-sided transports: the source sends each piece that it has announced, the destination receives it.

    source         fill ─▶ post ─▶ wait            destination         post ─▶ wait, then empty

Every route has a pair of its own: staging slots and threads at each end. One connects and posts, in the order announced; one waits for what
was posted, in that order; at the source a third fills slots, beside what is being sent. From the announcement on no other thread is asked.
What differs is below: the wire (`Wire`: gloo over TCP, NCCL between GPUs) and where the slots are (`slots`). An announced piece is always
sent and always received, so nobody aborts a pair but for a peer that is dead or silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Protocol

from torch import Tensor

from ...core.recordings import Doing
from ...core.spans import span
from ..actions import Receive, Stage
from ..crossing import Crossing
from ..packing import name_of
from ..pool import Pool
from ..slots import Slots, slots_for
from ..staging import SENT_TOGETHER, SLOTS_PER_PAIR
from .rendezvous import ToldStore

log = logging.getLogger(__name__)

SOURCE, DESTINATION = 0, 1
"""Ranks of a pair."""
SPOILT = 0xFFFFFFFF
"""In the seal of a piece whose blocks may have been another's before it was read: what has come is then not what was announced."""


class Work(Protocol):
    """What a wire was asked for."""

    def wait(self, timeout: timedelta) -> object:
        """Returns when it is done. Raises whatever is wrong, also that it takes longer."""
        ...


class Wire(Protocol):
    """One end of a pair's connection. All but `give_up` are called on the pair's own threads; whatever they raise ends the pair."""

    def connect(self, store: ToldStore) -> None:
        """Find the other end, with which `store` is shared; returns when both can send and receive."""
        ...

    def send(self, data: Tensor) -> Work: ...
    def receive(self, data: Tensor) -> Work: ...

    def give_up(self) -> None:
        """From any thread, the loop's among them, at once: from here on nobody need wait for the other end."""
        ...

    def abort(self) -> None:
        """On the thread that has connected: who waits for work gets an error. After `give_up`."""
        ...

    def close(self) -> None:
        """When nobody waits any more."""
        ...


class Wires(Protocol):
    """A two-sided transport at one rank."""

    host: str
    """By which its peers know it."""
    connect_s: float
    """Longest wait of an end for the next thing that the other says while they connect."""

    def wire(self, end: int) -> Wire: ...

    def close(self) -> None:
        """When every wire is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Ground:
    """What one end of a route's pair stands on. `slot_bytes`: the length of a staging slot, equal at both ends."""

    pool: Pool
    name: str
    wires: Wires
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
    sent: Callable[[int], None] = lambda count: None
    copied: Callable[[str, int, str | None], None] = lambda transfer_id, seq, error: None
    fenced: Callable[[str], None] = lambda transfer_id: None


class Jobs:
    """A thread that does what it is given, in order, until it is given None."""

    def __init__(self, name: str, guarded: Callable[[Callable[[], None]], None]) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._guarded = guarded
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self.put = self._queue.put
        self.start = self._thread.start

    def end(self) -> None:
        """Returns when all that it was given is done."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._guarded(job)


class Pair:
    """One end of a pair. Public methods are called on the asyncio thread and return at once."""

    def __init__(self, end: int, ground: Ground, events: PairEvents) -> None:
        """Begins to connect."""
        self._ground, self._crossing, self._events = ground, ground.crossing, events
        self._silence = timedelta(seconds=ground.silence_s)
        self._loop = asyncio.get_running_loop()
        self._wire = ground.wires.wire(end)
        self._store = ToldStore(lambda key, value: self._call_soon(events.say, key, value), ground.wires.connect_s)
        self._slots: Slots
        self._free: SimpleQueue[int | None] = SimpleQueue()
        """The slots that hold nothing; None when the pair is lost."""
        for slot in range(SLOTS_PER_PAIR):
            self._free.put(slot)
        self._lost = False
        self._failed = False
        """On one of its threads, and the loop has not been told yet: what stands behind is not begun."""
        self._ended = asyncio.Event()
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._others = [Jobs("diptych-pair-wait", self._guarded)]
        self._posted = self._others[0]
        self._made = [self._wire.close]
        """What is to be closed when all threads have ended."""
        self._poster = Thread(target=self._run, name="diptych-pair-post", daemon=True)

    def _begin(self) -> None:
        for jobs in self._others:
            jobs.start()
        self._poster.start()

    def introduce(self, key: str, value: bytes) -> None:
        self._store.heard(key, value)

    def close(self) -> None:
        """Give everything up. The connection ends, which the peer notices."""
        self._lose()
        self._queue.put(None)

    async def wait_closed(self) -> None:
        """After `close`: returns when all threads have ended."""
        await self._ended.wait()
        self._poster.join()

    def _lose(self) -> None:
        """From here on nothing is told and no job is begun. From any thread."""
        self._lost = True
        self._store.close()
        self._wire.give_up()
        self._free.put(None)

    def _call_soon(self, call: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    def _tell(self, event: Callable[..., None], *arguments: object) -> None:
        self._call_soon(self._tell_unless_lost, event, arguments)

    def _tell_unless_lost(self, event: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if not self._lost:
            event(*arguments)

    # -- on the poster's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._guarded(self._connect)
        while (job := self._queue.get()) is not None:
            self._guarded(job)
        _ended(self._wire.abort)
        for jobs in self._others:
            jobs.end()
        for close in self._made:
            _ended(close)
        self._call_soon(self._ended.set)

    def _connect(self) -> None:
        self._slots = slots_for(self._ground.pool, self._crossing, self._ground.slot_bytes)
        self._made.append(self._slots.close)
        self._wire.connect(self._store)
        self._tell(self._events.connected)

    # -- on every thread ----------------------------------------------------------------------------------------------

    def _guarded(self, job: Callable[[], None]) -> None:
        if self._lost or self._failed:
            return
        try:
            job()
        except Exception as error:  # whatever it is, the two ends are out of step from here on
            self._failed = True
            log.debug("a pair is lost", exc_info=error)
            self._call_soon(self._broke, str(error) or type(error).__name__)

    def _broke(self, reason: str) -> None:
        if not self._lost:
            self._lose()
            self._events.broken(f"The {self._ground.name} pair of {self._ground.wires.host} is lost: {reason}")


def _ended(what: Callable[[], None]) -> None:
    """Whatever it raises, such as an error that CUDA repeats at every call: whoever waits for the pair's end goes on."""
    try:
        what()
    except Exception:
        log.exception("a pair could not be ended as it should")


class Outgoing(Pair):
    """The source's end."""

    def __init__(self, ground: Ground, events: PairEvents) -> None:
        super().__init__(SOURCE, ground, events)
        self._filling = Jobs("diptych-pair-fill", self._guarded)
        self._others.append(self._filling)
        self._asked = self._sent = self._told = 0
        self._begin()

    def stage(self, stage: Stage) -> None:
        """Send the piece behind those asked for before it; `sent(count)` follows."""
        self._asked += 1
        self._filling.put(partial(self._fill, stage))

    def _fill(self, stage: Stage) -> None:
        slot = self._free.get()
        if slot is None:
            return
        with span(Doing.PACK, who=(stage.transfer_id,)):
            checksum = self._slots.fill(slot, stage.span, stage.blocks)
        stands = self._ground.pool.word(stage.slot) == stage.word  # looked at when all is read, and set before anything is overwritten
        self._slots.seal(slot, checksum ^ name_of(stage.transfer_id, stage.seq) ^ (0 if stands else SPOILT))
        self._queue.put(partial(self._send, slot, self._crossing.bytes(stage.span)))

    def _send(self, slot: int, length: int) -> None:
        work = self._wire.send(self._slots.view(slot, length))
        self._posted.put(partial(self._wait, work, slot))

    def _wait(self, work: Work, slot: int) -> None:
        work.wait(self._silence)
        self._free.put(slot)
        self._sent += 1
        if self._sent == self._asked or self._sent - self._told == SENT_TOGETHER:
            self._tell(self._events.sent, self._sent - self._told)
            self._told = self._sent


class Incoming(Pair):
    """The destination's end."""

    def __init__(self, ground: Ground, events: PairEvents) -> None:
        super().__init__(DESTINATION, ground, events)
        self._lock = Lock()
        self._given_up: set[str] = set()
        self._emptying: str | None = None
        self._begin()

    def receive(self, receive: Receive) -> None:
        """Take the next piece; `copied` follows if it was not to be dropped."""
        self._queue.put(partial(self._post, receive))

    def fence(self, transfer_id: str) -> None:
        """What has come of the transfer and is not in the pool yet will not be put there. `fenced` follows whatever becomes of the pair:
        it waits for no peer, only for one copy that may be under way."""
        with self._lock:
            self._given_up.add(transfer_id)
            if self._emptying != transfer_id:
                self._loop.call_soon(self._events.fenced, transfer_id)
        self._queue.put(lambda: self._posted.put(partial(self._given_up.discard, transfer_id)))

    def _post(self, receive: Receive) -> None:
        slot = self._free.get()
        if slot is None:
            return
        work = self._wire.receive(self._slots.view(slot, self._crossing.bytes(receive.span)))
        self._posted.put(partial(self._wait, work, slot, receive))

    def _wait(self, work: Work, slot: int, receive: Receive) -> None:
        work.wait(self._silence)
        if receive.blocks is not None:
            self._take(receive, receive.blocks, slot)
        self._free.put(slot)

    def _take(self, receive: Receive, blocks: tuple[int, ...], slot: int) -> None:
        with self._lock:
            if receive.transfer_id in self._given_up:
                return
            self._emptying = receive.transfer_id
        try:
            with span(Doing.UNPACK, who=(receive.transfer_id,)):
                error = self._emptied(receive, blocks, slot)
        finally:  # whatever it raises ends the pair, and then too a fence must be answered
            fenced = self._leave(receive.transfer_id)
        if not fenced:
            self._tell(self._events.copied, receive.transfer_id, receive.seq, error)

    def _leave(self, transfer_id: str) -> bool:
        """Nothing is put into the pool any more. Whether the transfer was fenced meanwhile: then that is answered now."""
        with self._lock:
            self._emptying = None
            if transfer_id not in self._given_up:
                return False
            self._call_soon(self._events.fenced, transfer_id)
            return True

    def _emptied(self, receive: Receive, blocks: tuple[int, ...], slot: int) -> str | None:
        """Why the piece does not count, or None if it lies in the pool."""
        try:
            if self._slots.empty(slot, receive.span, blocks, name_of(receive.transfer_id, receive.seq)):
                return None
        except OverflowError as error:
            return f"Piece {receive.seq} could not be copied: {error}."
        return f"The checksum of piece {receive.seq} is wrong."
