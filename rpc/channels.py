"""Channels, calls and addresses: every option with its reason, every grpc error translated before it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor

from ..core.errors import Cancelled, ConfigError, Unavailable
from ..core.security import TlsFiles
from .credentials import INTERNAL_OPTIONS, internal_credentials
from .errors import from_grpc

INTERNAL_MESSAGE_BYTES = 64 << 20
"""Between workers, routers and supervisor: a prompt of a million tokens is 4 MiB."""

ANSWER_S = 10.0
"""A short question to a live process is answered within this many seconds."""

EOF: object = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
"""What grpc.aio reads after the last message."""

Options = list[tuple[str, int]]

KEEPALIVE_MS = 2_000
"""A connection without traffic for this long is probed; grpc's own threads answer, so a busy process lives."""
PING_TIMEOUT_MS = 4_000
"""A server that has not answered a probe by then is lost: a host that vanished, a process that was stopped. (grpc waits a minute.)
Its threads need microseconds of a core, which a host with 30 busy threads a core still gives within a tenth of a second."""
HANDSHAKE_MS = 10_000
"""Who connects has said that it speaks HTTP/2, and ended its TLS handshake, by then. (grpc waits two minutes.)"""
CLIENT_IDLE_MS = 65_000
"""A client's connection without a call is ended after this long, or at most twice as long; it connects again when it has one."""
CLIENT_KEEPALIVE_MS = 10_000
CLIENT_PING_TIMEOUT_MS = 20_000
"""A client's connection may be slow, and the answer waits behind megabytes of text."""


def _keepalive(after_ms: int, ping_timeout_ms: int) -> Options:
    return [
        ("grpc.keepalive_time_ms", after_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Both: the first alone does not count while the peer's kernel still acknowledges.
        ("grpc.keepalive_timeout_ms", ping_timeout_ms),
        ("grpc.http2.ping_timeout_ms", ping_timeout_ms),
    ]


def channel_options(max_message_bytes: int) -> Options:
    return [
        *_keepalive(KEEPALIVE_MS, PING_TIMEOUT_MS),
        # Workers have local addresses; a proxy from the environment would break them, or see what it should not.
        ("grpc.enable_http_proxy", 0),
        # A connection of its own per channel: no sharing of its fate, or of its backoff, with other channels to that address.
        ("grpc.use_local_subchannel_pool", 1),
        # A worker that comes back is found within a second, not after grpc's default of up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
    ]


def server_options(max_message_bytes: int) -> Options:
    return [
        *_keepalive(CLIENT_KEEPALIVE_MS, CLIENT_PING_TIMEOUT_MS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        # Otherwise two servers share a port in silence and each gets half of the calls.
        ("grpc.so_reuseport", 0),
        # Our own clients' probes (every 2 s, above) must not count as abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
    ]


def public_options(streams: int) -> Options:
    """Of a server that anybody can reach. `streams`: calls under way on one connection."""
    return [("grpc.max_connection_idle_ms", CLIENT_IDLE_MS), ("grpc.max_concurrent_streams", streams)]


def split_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port of `host:port`; `ConfigError` if it is not that."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address; it must be host:port, such as 127.0.0.1:50051.", field="address")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, more: Sequence[tuple[str, str]] = ()
) -> grpc.aio.Channel:
    """A channel of the running event loop that connects when first used, and again after the connection was lost; a plain one without
    `credentials`."""
    split_address(address)
    asyncio.get_running_loop()  # RuntimeError here, where grpc would take a loop that nobody runs
    options = [*channel_options(INTERNAL_MESSAGE_BYTES), *more]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def open_internal_channel(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    """A channel to a process of the cluster, with the certificates of the files as they are now; plain without. Raises `ConfigError`."""
    return open_channel(address, internal_credentials(tls), INTERNAL_OPTIONS if tls else ())


Metadata = tuple[tuple[str, str], ...]


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


async def call_unary(
    channel: grpc.aio.Channel, method: MethodDescriptor, request: bytes, *, timeout_s: float, peer: str, metadata: Metadata = ()
) -> bytes:
    """The answer to `request`; raises only `DiptychError`."""
    call = _start(lambda: channel.unary_unary(path_of(method), None, None)(request, timeout=timeout_s, metadata=metadata), peer)
    try:
        return cast(bytes, await call)
    except grpc.RpcError as error:
        raise from_grpc(error, peer=peer) from None
    except asyncio.CancelledError:
        _reraise_if_ours()
        raise closed(peer) from None


async def call_stream(
    channel: grpc.aio.Channel, method: MethodDescriptor, request: bytes, *, timeout_s: float | None, peer: str, metadata: Metadata = ()
) -> AsyncGenerator[bytes, None]:
    """The messages that answer `request`; closing the generator cancels the call; raises only `DiptychError`."""
    call = _start(lambda: channel.unary_stream(path_of(method), None, None)(request, timeout=timeout_s, metadata=metadata), peer)
    try:
        while (data := await call.read()) is not EOF:
            yield data
    except grpc.RpcError as error:
        raise from_grpc(error, peer=peer) from None
    except asyncio.CancelledError:
        _reraise_if_ours()
        raise closed(peer) from None
    finally:
        call.cancel()


def _start(call: Callable[[], Any], peer: str) -> Any:
    try:
        return call()
    except grpc.aio.UsageError:  # all that grpc.aio finds wrong with a call it has not begun
        raise closed(peer) from None


def closed(peer: str) -> Cancelled:
    return Cancelled(f"{peer}: the client was closed.")


def _reraise_if_ours() -> None:
    """grpc raises CancelledError too when the *call* was cancelled, by closing its channel; only a cancelled task is to see one."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class ClientCall:
    """The `ByteCall` of a bidirectional call made here."""

    def __init__(self, channel: grpc.aio.Channel, method: MethodDescriptor, *, peer: str, owns_channel: bool = False) -> None:
        """`owns_channel`: the channel is closed when the call ends. Raises `Cancelled` if the channel is closed already."""
        self._call = _start(cast(Any, channel.stream_stream(path_of(method), None, None)), peer)
        # Iterated, not read(): after a failed write read() raises at once, and what the peer had sent before it ended would be lost.
        self._messages: AsyncIterator[bytes] = aiter(self._call)
        self._peer = peer
        self._closing: asyncio.Task[None] | None = None
        if owns_channel:
            self._call.add_done_callback(lambda _: self._close_channel(channel))

    def _close_channel(self, channel: grpc.aio.Channel) -> None:
        self._closing = asyncio.get_running_loop().create_task(channel.close(None))

    async def accepted(self) -> None:
        """Return when the server's handler has begun; `DiptychError` if the call failed instead."""
        await self._call.initial_metadata()
        if self._call.done():
            await self.read()
            raise Unavailable(f"{self._peer} ended the stream at once.")

    async def read(self) -> bytes | None:
        try:
            return await anext(self._messages, None)
        except grpc.RpcError as error:
            raise from_grpc(error, peer=self._peer) from None
        except asyncio.CancelledError:
            _reraise_if_ours()
            return None

    async def write(self, message: bytes) -> None:
        with self._translated():
            await self._call.write(message)

    async def done_writing(self) -> None:
        with self._translated():
            await self._call.done_writing()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_grpc(error, peer=self._peer) from None
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise Unavailable(f"{self._peer}: the stream has ended ({error}).") from None

    def cancel(self) -> None:
        self._call.cancel()
