"""One request over one connection, each event stamped when its last byte came. Events are read only after the answer has ended, so
that while tokens come the client does no more than find their borders."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from ...core.errors import ConfigError, Unavailable
from .answer import Wire
from .sse import EventReader

TIMING_HEADER = "x-diptych-timing"
"""Asks a Diptych router for its own times; other servers pass over it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, its name looked up once: looking it up for each request would be measured as the server's."""

    host: str
    port: int
    address: str
    path: str
    tls: ssl.SSLContext | None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    async def find(cls, url: str, api_key: str | None, ca: str | None = None) -> Endpoint:
        """`url`: http://host:port, with or without `/v1`; over https it is known by the authority of the file `ca`, or by the system's.
        Raises `ConfigError` for no URL, `Unavailable` for an unknown host."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server; give http://HOST:PORT.", field="url")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=1)
        except OSError as error:
            raise Unavailable(f"{parts.hostname} cannot be found: {error.strerror}.") from None
        headers = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        tls = _known_by(ca) if parts.scheme == "https" else None
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, str(found[0][4][0]), path, tls, headers)

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _known_by(ca: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"The authority {ca} cannot be read: {error.strerror or error}.", field="ca") from None


class _Exchange(asyncio.Protocol):
    """HTTP/1.1 for one request. `over` is done when the answer has ended, however."""

    def __init__(self, wire: Wire, request: bytes, head: h11.Request) -> None:
        self._wire = wire
        self._http = h11.Connection(h11.CLIENT)
        self._head, self._request = head, request
        self._reader = EventReader()
        self._body = bytearray()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._wire.connected = time.perf_counter()
        parts = [self._http.send(self._head), self._http.send(h11.Data(self._request)), self._http.send(h11.EndOfMessage())]
        transport.write(b"".join(part for part in parts if part))

    def data_received(self, data: bytes) -> None:
        self._take(data, time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and not self.over.done():
            self._take(b"", time.perf_counter())
        self._end("connection lost")

    def _take(self, data: bytes, now: float) -> None:
        try:
            self._http.receive_data(data)
            while not self.over.done():
                match self._http.next_event():
                    case h11.Response(status_code=status):
                        self._wire.status = status
                    case h11.Data(data=part):
                        self._content(bytes(part), now)
                    case h11.EndOfMessage():
                        self._end(None)
                    case h11.NEED_DATA | h11.PAUSED | h11.ConnectionClosed():
                        return
        except h11.RemoteProtocolError:
            self._end("connection lost" if not data else "answer that is not HTTP")

    def _content(self, part: bytes, now: float) -> None:
        if self._wire.status == 200 and self._head.method == b"POST":
            self._wire.events += [(now, event) for event in self._reader.feed(part)]
        else:
            self._body += part

    def _end(self, failure: str | None) -> None:
        if not self.over.done():
            self._wire.failure = failure
            self._wire.ended = time.perf_counter()
            self._wire.body = bytes(self._body)
            self.over.set_result(None)


async def exchange(endpoint: Endpoint, method: str, path: str, body: bytes, timeout_s: float) -> Wire:
    """Send one request on a connection of its own and wait for the end of its answer, at most `timeout_s`; never raises for what
    the server or the network does."""
    headers = [
        ("host", endpoint.authority), ("connection", "close"), ("content-type", "application/json"),
        ("content-length", str(len(body))), (TIMING_HEADER, "1"), *endpoint.headers,
    ]  # fmt: skip
    head = h11.Request(method=method, target=endpoint.path + path, headers=headers)
    wire = Wire(begun=time.perf_counter())
    protocol = _Exchange(wire, body, head)
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            name = endpoint.host if endpoint.tls else None
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: protocol, endpoint.address, endpoint.port, ssl=endpoint.tls, server_hostname=name
            )
            await protocol.over
    except TimeoutError:
        wire.failure = "timeout"
    except OSError as error:
        wire.failure = f"cannot connect: {type(error).__name__}"
    finally:
        if transport is not None:
            transport.abort()
    wire.ended = wire.ended or time.perf_counter()
    return wire
