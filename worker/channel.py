"""What the leader of a worker and one of its followers say to each other: messages in frames, over one TCP connection.

Each end is also the other's watch. A worker is whole or dead: whoever finds the stream broken, or the other silent, is lost itself.

    kind (1 byte) │ length of the payload (4 bytes, little-endian) │ payload
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from struct import Struct, pack
from typing import Protocol

from ..core.errors import Unavailable

SILENCE_S = 6.0
"""A rank that has said nothing for so long is lost; as for peers (`rpc.channels`)."""
PING_EVERY_S = 2.0
"""Each end says something at least this often, from a thread that does nothing else."""
READ_BYTES = 1 << 16

_HEADER = Struct("<BI")
_KEY = Struct("<I")


class Kind(IntEnum):
    """Who says it, and what its payload is."""

    PING = 0
    HELLO = 1
    """Follower: who it is (`meeting.Hello`)."""
    WELCOME = 2
    """Leader: every follower is there."""
    REFUSED = 3
    """Leader: why this follower cannot be one of its (`meeting.Refusal`). It hears no more."""
    STORE = 4
    """Both: a key and its value, for the stores of all ranks (`pack_entry`)."""
    READY = 5
    """Follower: it can compute; where its pool is (`core.transfer.ShmEndpoint`)."""
    STEP = 6
    """Leader: whether to say STORED (1 byte), and a batch."""
    STORED = 7
    """Follower: step and layer (`stepping.STORED`); before the step's RAN."""
    RAN = 8
    """Follower: its part of a step is done; the step's output, without rows if it is not this rank that draws."""
    ORDER = 9
    ANSWER = 10
    """Leader and follower: of transfers (`kv_transfer.order_codec`)."""
    CLOSE = 11
    """Leader: every lane is detached and every fence answered."""
    CLOSED = 12
    """Follower: no transfer touches its pool any more."""
    END = 13
    """Leader: compute what was said, and end. The answer is the end of the stream."""
    ROLE = 14
    """Leader, when all is CLOSED: compute what was said, and take another role, which the payload names. The answer is READY."""


class Connection(Protocol):
    """What a channel needs of a socket. One thread may read while another writes."""

    def settimeout(self, value: float | None, /) -> None: ...

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None: ...

    def recv(self, count: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> None: ...

    def fileno(self) -> int: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


Heard = Callable[[Kind, bytes], None]
Died = Callable[[BaseException], None]
"""Called with why this process is lost, on the thread that found it; must end the process."""


class Channel:
    """One end. What is sent by one thread arrives in order; `heard` is called on a thread of the channel's own and must not wait."""

    def __init__(self, connection: Connection, peer: str, heard: Heard, died: Died, *, silence_s: float = SILENCE_S) -> None:
        """`peer`: what the other end is called. `silence_s`: longer than `PING_EVERY_S`, or no end would be heard in time."""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # For reading alone, so that a send may take as long as the watch lets it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, pack("@ll", int(silence_s), round(silence_s % 1 * 1e6)))
        self._connection, self._peer, self._heard, self._died, self._silence_s = connection, peer, heard, died, silence_s
        self._sending = threading.Lock()
        self._over = False
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._guarded, args=(self._read,), name=f"channel to {peer}", daemon=True)
        self._pinger = threading.Thread(target=self._guarded, args=(self._ping,), name=f"pings to {peer}", daemon=True)

    def start(self) -> None:
        self._reader.start()
        self._pinger.start()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """From any thread. Waits only while the other end does not read, which its watch ends."""
        frame = _HEADER.pack(kind, len(payload)) + payload
        try:
            with self._sending:
                self._connection.sendall(frame)
        except OSError as error:
            self._lose(f"it cannot be told anything ({error})")

    def end(self) -> None:
        """From now on the end of the stream is no loss; silence still is."""
        self._over = True

    def close(self) -> None:
        """After `end`: end the stream, as the other end expects."""
        with suppress(OSError):  # it has ended it already
            self._connection.shutdown(socket.SHUT_RDWR)
        self.wait_ended()

    def wait_ended(self) -> None:
        """After `end`: returns when the other end has closed the stream; closes this one."""
        self._reader.join()
        self._pinger.join()
        self._connection.close()

    def _read(self) -> None:
        try:
            for kind, payload in self._frames():
                if kind is not Kind.PING:
                    self._heard(kind, payload)
            self._lose("it has closed the connection")
        finally:
            self._ended.set()

    def _frames(self) -> Iterator[tuple[Kind, bytes]]:
        """What comes until the stream ends."""
        unread = bytearray()
        while chunk := self._receive():
            unread += chunk
            at = 0
            while (end := _end(unread, at)) <= len(unread):
                yield Kind(unread[at]), bytes(unread[at + _HEADER.size : end])
                at = end
            del unread[:at]

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(READ_BYTES)
        except BlockingIOError:
            raise self._loss(f"it has said nothing for {self._silence_s:g} s") from None
        except OSError as error:
            self._lose(str(error))
            return b""

    def _ping(self) -> None:
        while not self._ended.wait(PING_EVERY_S):
            self.send(Kind.PING)

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - whatever it is, this end hears or says nothing more, and its process is lost
            self._died(error)

    def _lose(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._died(self._loss(reason))

    def _loss(self, reason: str) -> Unavailable:
        return Unavailable(f"Lost {self._peer} of this worker: {reason}.")


def _end(unread: bytearray, at: int) -> int:
    """Where the frame that begins at `at` ends, as far as can be seen."""
    return at + _HEADER.size + (_HEADER.unpack_from(unread, at)[1] if len(unread) - at >= _HEADER.size else 0)


def pack_entry(key: str, value: bytes) -> bytes:
    """Of a store; `unpack_entry` is the exact inverse."""
    name = key.encode()
    return _KEY.pack(len(name)) + name + value


def unpack_entry(payload: bytes) -> tuple[str, bytes]:
    end = _KEY.size + _KEY.unpack_from(payload)[0]
    return payload[_KEY.size : end].decode(), payload[end:]


def say(connection: Connection, kind: Kind, payload: bytes) -> None:
    """One frame, before there is a channel."""
    connection.sendall(_HEADER.pack(kind, len(payload)) + payload)


def hear(connection: Connection, most_bytes: int) -> tuple[Kind, bytes] | None:
    """The next frame, and not a byte more, before there is a channel; None at the end of the stream. Raises `ValueError` for what is none,
    or longer than `most_bytes`."""
    header = _exactly(connection, _HEADER.size)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    if length > most_bytes:
        raise ValueError(f"a message of {length} bytes")
    payload = _exactly(connection, length)
    return None if payload is None else (Kind(kind), payload)


def _exactly(connection: Connection, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        if not (chunk := connection.recv(count - len(data))):
            return None
        data += chunk
    return data
