"""Where the file of a pool is handed out: an abstract Unix socket. Who comes must be of the same user, and have been told the pool's nonce,
which is said on lanes alone.

    source   ── challenge (16 bytes) ───────▶   destination
             ◀────────── answer (32 bytes) ──   HMAC-SHA256 of the challenge, keyed by the nonce
             ── the file's descriptor ──────▶

The kernel says of which user somebody is; but containers that share a host's network see each other's sockets, and are often all root. The
nonce itself does not cross, so that whoever has taken the socket's name in another place learns nothing that opens this one; and an answer
is good once.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable
from functools import partial

log = logging.getLogger(__name__)

CHALLENGE_BYTES, ANSWER_BYTES = 16, 32
ANSWER_S = 3.0
"""For one who has connected to answer: less than the destination's patience (`transports.one_sided.ATTACH_S`)."""
AT_ONCE = 64
"""Who may be asked at once, and wait to be asked."""
CREDENTIALS = "3i"
"""Process, user and group, as SO_PEERCRED has them."""
REFUSED = "process %d of user %d asked for the pool's memory and %s: it gets nothing"


class Door:
    """Hands out `fd`, which stays the caller's. Every method is called on the asyncio thread."""

    def __init__(self, fd: int, nonce: bytes) -> None:
        self.listener = _listen()
        self.name = self.listener.getsockname()[1:].decode()
        self._fd, self._nonce = fd, nonce
        self._asked: set[asyncio.Task[None]] = set()

    def answer(self, refused: Callable[[], None] = lambda: None) -> None:
        """Somebody has connected. Does not block: what is asked of him, and given to him, follows; or `refused` is called."""
        try:
            connection, _ = self.listener.accept()
        except OSError as error:
            log.info("a process asked for the pool and went away: %s", error)
            return
        connection.setblocking(False)
        if len(self._asked) >= AT_ONCE:
            log.warning("%d processes ask for the pool at once; one more is hung up on", AT_ONCE)
            connection.close()
            refused()
            return
        task = asyncio.get_running_loop().create_task(self._serve(connection, refused), name="hand a pool out")
        self._asked.add(task)
        task.add_done_callback(partial(self._served, connection))

    def close(self) -> None:
        """Nobody gets anything from here on."""
        self.listener.close()
        for task in self._asked:
            task.cancel()

    async def _serve(self, connection: socket.socket, refused: Callable[[], None]) -> None:
        pid, uid, _ = struct.unpack(CREDENTIALS, connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(CREDENTIALS)))
        if (fault := "is another user's" if uid != os.getuid() else await self._asks(connection)) is not None:
            log.warning(REFUSED, pid, uid, fault)
            refused()

    async def _asks(self, connection: socket.socket) -> str | None:
        """Give the file to one who knows; else why not."""
        try:
            async with asyncio.timeout(ANSWER_S):
                knows = await self._knows(connection)
            if not knows:
                return "does not know what was said on a lane"
            socket.send_fds(connection, [b"\0"], [self._fd], flags=socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:  # TimeoutError is one
            return f"did not say what was said on a lane ({error or type(error).__name__})"
        return None

    async def _knows(self, connection: socket.socket) -> bool:
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        await asyncio.get_running_loop().sock_sendall(connection, challenge)
        return hmac.compare_digest(await _exactly(connection, ANSWER_BYTES), _answer(self._nonce, challenge))

    def _served(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._asked.discard(task)
        connection.close()


async def ask_at(name: str, nonce: bytes) -> int:
    """The file descriptor that the door `name` of this host hands out. Raises `ConnectionError` if it hands out nothing, any `OSError` if
    it is not there."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as connection:
        await loop.sock_connect(connection, f"\0{name}")
        await loop.sock_sendall(connection, _answer(nonce, await _exactly(connection, CHALLENGE_BYTES)))
        await _readable(connection)
        _, fds, _, _ = socket.recv_fds(connection, 1, 1, flags=socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise ConnectionRefusedError("it hands out nothing, since to it we do not know what was said on the lane")
    return fds[0]


def _answer(nonce: bytes, challenge: bytes) -> bytes:
    return hmac.digest(nonce, challenge, "sha256")


async def _exactly(connection: socket.socket, count: int) -> bytes:
    loop, said = asyncio.get_running_loop(), b""
    while len(said) < count:
        more = await loop.sock_recv(connection, count - len(said))
        if not more:
            raise ConnectionRefusedError("it hung up, perhaps because we are another user's")
        said += more
    return said


async def _readable(connection: socket.socket) -> None:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)


def _listen() -> socket.socket:
    """It has no file, and goes with the process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.bind(f"\0diptych-kv-{secrets.token_hex(16)}")
    listener.listen(AT_ONCE)
    return listener
