"""Mutual TLS between the ranks of a worker: a connection that one thread reads while another writes.

Python's own `SSLSocket` does not allow that: OpenSSL's state of a connection is one for both directions. Here it is touched under a
lock, for as long as encrypting takes, and nobody holds that lock while he waits for the network.
"""

from __future__ import annotations

import socket
import ssl
import threading

from ..core.security import INTERNAL_NAME, TlsFiles
from ..core.tls import client_context, server_context
from .channel import Connection

READ_BYTES = 1 << 16


def accepted(connection: socket.socket, tls: TlsFiles | None) -> Connection:
    """A rank that has come, if it has a certificate of the cluster; with the files as they are now. Raises `OSError` (of which
    `ssl.SSLError` is one) if not."""
    if tls is None:
        return connection
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    return SecureConnection(connection, server_context(tls).wrap_bio(incoming, outgoing, server_side=True), incoming, outgoing)


def connected(connection: socket.socket, tls: TlsFiles | None) -> Connection:
    """The leader, if it has a certificate of the cluster. Raises `OSError` if not."""
    if tls is None:
        return connection
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tunnel = client_context(tls).wrap_bio(incoming, outgoing, server_hostname=INTERNAL_NAME)
    return SecureConnection(connection, tunnel, incoming, outgoing)


class SecureConnection:
    """A `Connection`, of which at most one thread reads and one writes at a time."""

    def __init__(self, connection: socket.socket, tunnel: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        """Shakes hands, within the connection's time-out for each message."""
        self._connection, self._tunnel, self._incoming, self._outgoing = connection, tunnel, incoming, outgoing
        self._lock = threading.Lock()
        self._shake_hands()

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tunnel.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._connection.sendall(self._outgoing.read())
                self._fetch()
            except ssl.SSLError:
                self._connection.sendall(self._outgoing.read())  # why: the other end shall know
                raise
        self._connection.sendall(self._outgoing.read())

    def _fetch(self) -> None:
        data = self._connection.recv(READ_BYTES)
        with self._lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def recv(self, count: int) -> bytes:
        """What has come, `count` bytes at most; b"" at the end of the stream."""
        while (data := self._opened(count)) is None:
            self._fetch()
        return data

    def _opened(self, count: int) -> bytes | None:
        """What has been decrypted; None if more must come first."""
        with self._lock:
            try:
                return self._tunnel.read(count)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLWantReadError:
                return None

    def sendall(self, data: bytes) -> None:
        with self._lock:
            rest = memoryview(data)
            while rest:
                rest = rest[self._tunnel.write(rest) :]
            sealed = self._outgoing.read()
        self._connection.sendall(sealed)

    def settimeout(self, value: float | None) -> None:
        self._connection.settimeout(value)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._connection.setsockopt(level, option, value)

    def fileno(self) -> int:
        return self._connection.fileno()

    def shutdown(self, how: int) -> None:
        self._connection.shutdown(how)

    def close(self) -> None:
        self._connection.close()
