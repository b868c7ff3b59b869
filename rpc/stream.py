"""One end of a bidirectional stream, in core types: the same class for router ↔ worker, lane, client side and server side.

`send` queues and never blocks; a writer task writes what is queued, a reader task reads ahead (bounded, so a slow consumer
slows its peer down). Everything here belongs to the event loop's thread: from another thread use `loop.call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, Self, TypeVar

from ..core.errors import DiptychError, Unavailable
from ..core.recordings import Doing
from ..core.spans import span

log = logging.getLogger(__name__)

Out = TypeVar("Out")
In = TypeVar("In")

QUEUED_MESSAGES = 4096
"""A peer with this many messages unread is cut; at one message per 20 ms step that is 80 s behind."""
QUEUED_BYTES = 64 << 20
READ_AHEAD = 256
"""Messages read and not yet taken; beyond it HTTP/2 flow control holds the peer."""
CLOSE_S = 1.0
"""How long a closing end waits for its last messages to be written and for the peer to end, in seconds."""


class ByteCall(Protocol):
    """What a stream needs of a call; every method raises only `DiptychError`."""

    async def read(self) -> bytes | None:
        """The next message; None after the last one."""
        ...

    async def write(self, message: bytes) -> None: ...

    async def done_writing(self) -> None:
        """Tell the peer that nothing more comes."""
        ...

    def cancel(self) -> None:
        """End the call at once, in both directions."""
        ...


def alone(decode: Callable[[bytes], In]) -> Callable[[bytes], Sequence[In]]:
    """Of a stream on which each message is written by itself."""
    return lambda data: (decode(data),)


class Stream(Generic[Out, In]):
    """`send` messages and iterate over the peer's, or have `each` taken as it is read.

    Iteration ends when the stream was closed at either end; it raises `Unavailable` when the peer or the connection died, or when
    this end cut a peer that does not read; `InvalidRequest` when the peer sent what is no message; or the error the peer ended with.
    """

    def __init__(self, call: ByteCall, encode: Callable[[Out], bytes], decode: Callable[[bytes], Sequence[In]], *, peer: str) -> None:
        """`peer`: how the other end is named in errors and logs. `decode`: the messages in what the peer has written at once."""
        self.peer = peer
        self._call = call
        self._encode = encode
        self._decode = decode
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._inbox: deque[In] = deque()
        self._take: Callable[[In], None] | None = None
        self._defect: Exception | None = None
        self._error: DiptychError | None = None
        self._ended = False
        self._closing = False
        self._wake_writer = asyncio.Event()
        self._wake_consumer = asyncio.Event()
        self._wake_reader = asyncio.Event()
        self._writer = asyncio.create_task(self._write_queued())
        self._reader = asyncio.create_task(self._read_ahead())
        self._closer: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """True once nothing more can be sent."""
        return self._ended or self._closing

    def send(self, message: Out) -> None:
        """Queue `message`; never blocks. On a stream that has ended it does nothing: the iteration tells of the end."""
        if self.ended:
            return
        with span(Doing.ENCODE):
            data = self._encode(message)
        self._outbox.append(data)
        self._outbox_bytes += len(data)
        if len(self._outbox) > QUEUED_MESSAGES or self._outbox_bytes > QUEUED_BYTES:
            self._cut()
            return
        self._wake_writer.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> In:
        while not self._inbox:
            if self._ended or self._closing:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._wake_consumer.clear()
            await self._wake_consumer.wait()
        self._wake_reader.set()
        return self._inbox.popleft()

    async def each(self, take: Callable[[In], None]) -> None:
        """Call `take` with every message in the turn of the event loop that has read it, where iterating takes another. Returns and raises
        as iteration does, and what `take` raised."""
        self._take = take
        try:
            self._give()
            while not (self._ended or self._closing or self._defect):
                self._wake_consumer.clear()
                await self._wake_consumer.wait()
        finally:
            self._take = None
        if self._defect is not None:
            raise self._defect
        if self._error is not None:
            raise self._error

    def _give(self) -> None:
        """What has been read, to whoever takes it as it is read."""
        while self._take is not None and self._inbox:
            try:
                self._take(self._inbox.popleft())
            except Exception as error:  # noqa: BLE001  the consumer's, which is to end by it, and not the reader
                self._defect, self._take = error, None
                self._wake_consumer.set()

    def close(self) -> None:
        """Send what is queued, then end the stream at both ends. Iteration here ends at once; returns without waiting."""
        if self._closer is None:
            self._closing = True
            self._inbox.clear()
            self._wake_writer.set()
            self._wake_consumer.set()
            self._closer = asyncio.create_task(self._close())

    async def wait_closed(self) -> None:
        """`close`, and wait until it is done (at most `CLOSE_S` and a little)."""
        self.close()
        assert self._closer is not None
        await asyncio.shield(self._closer)

    async def _close(self) -> None:
        done, _ = await asyncio.wait({self._writer, self._reader}, timeout=CLOSE_S)
        if len(done) < 2:
            self._writer.cancel()
            self._reader.cancel()
            self._call.cancel()
            await asyncio.wait({self._writer, self._reader})
        self._end(None)

    def end(self) -> None:
        """The peer is gone: drop what is queued; the iteration ends after what was received before."""
        self._end(None)

    async def finish(self) -> None:
        """At the serving end, before the call ends: write what is queued (for `CLOSE_S` at most), then stop."""
        self._closing = True
        self._wake_writer.set()
        await asyncio.wait({self._writer}, timeout=CLOSE_S)
        self._end(None)
        tasks = [task for task in (self._writer, self._reader, self._closer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def _cut(self) -> None:
        messages, size = len(self._outbox), self._outbox_bytes
        log.warning("%s: cut, it does not read: %d messages, %d bytes queued", self.peer, messages, size)
        self._end(Unavailable(f"{self.peer} does not read: {messages} messages ({size} bytes) were queued, so it was cut."))
        self._call.cancel()

    def _end(self, error: DiptychError | None) -> None:
        """Nothing more is sent or received (what was received before can still be taken). The first reason stands."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._outbox.clear()
            self._outbox_bytes = 0
        self._wake_writer.set()
        self._wake_reader.set()
        self._wake_consumer.set()

    def _next(self) -> bytes:
        """What to write at once: the oldest message."""
        data = self._outbox.popleft()
        self._outbox_bytes -= len(data)
        return data

    async def _write_queued(self) -> None:
        try:
            while not self._ended:
                while self._outbox:
                    await self._call.write(self._next())
                if self._closing:
                    await self._call.done_writing()
                    return
                self._wake_writer.clear()
                await self._wake_writer.wait()
        except DiptychError as error:
            # The reader learns the true reason from the call's status; this one only says that writing failed.
            log.debug("%s: writing ended: %s", self.peer, error)

    async def _read_ahead(self) -> None:
        try:
            while (data := await self._call.read()) is not None:
                if self._closing:
                    continue
                with span(Doing.DECODE):
                    self._inbox.extend(self._decode(data))
                if self._take is not None:
                    self._give()
                else:
                    self._wake_consumer.set()
                while len(self._inbox) >= READ_AHEAD and not self.ended:
                    self._wake_reader.clear()
                    await self._wake_reader.wait()
        except DiptychError as error:
            self._end(error)
            self._call.cancel()
        else:
            self._end(None)
