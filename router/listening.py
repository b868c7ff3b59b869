"""Where HTTP clients come in: a socket that takes so many connections and no more."""

from __future__ import annotations

import socket
from typing import Any
from weakref import WeakSet

from ..core.errors import ConfigError

BACKLOG = 2048
"""Connections waiting to be accepted; more are refused by the system."""
SEND_BUFFER = 128 << 10
"""Bytes the system keeps for a client that does not read (Linux doubles it). By default it grows to 4 MB, and a request whose client
has stopped reading would go on for that long."""


class BoundedListener(socket.socket):
    """Closes at once who comes while `most` connections are open: those that have not said a word, or not ended their TLS handshake,
    count too, which the protocol on top of it cannot see."""

    def __init__(self, family: int, kind: int, protocol: int, most: int) -> None:
        super().__init__(family, kind, protocol)
        self._most = most
        self._open: WeakSet[socket.socket] = WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises `ConnectionAbortedError`, which an event loop takes for a client that has gone again, if there are too many."""
        connection, address = super().accept()
        if len(self._open) >= self._most:
            self._open = WeakSet(one for one in self._open if one.fileno() >= 0)
        if len(self._open) >= self._most:
            connection.close()
            raise ConnectionAbortedError
        self._open.add(connection)
        return connection, address


def listen(host: str, port: int, most: int) -> BoundedListener:
    """A listening TCP socket; `ConfigError` naming `router.http_port` or `router.host` if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"router.host {host!r} is not an address of this machine: {error}.", field="router.host") from None
    listening = BoundedListener(family, kind, protocol, most)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        hint = "choose another, or 0 for a free one"
        raise ConfigError(
            f"router.http_port {port} cannot be had on {host} ({error.strerror}); {hint}.", field="router.http_port"
        ) from None
    return listening
