"""The server: any of the three faces on one port, with health and reflection where the public service is served."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from ..core.errors import ConfigError
from ..core.security import TlsFiles
from .channels import INTERNAL_MESSAGE_BYTES, join_address, public_options, server_options, split_address
from .credentials import server_credentials
from .handlers import Active, TenantOf, everybody, inference_handlers, router_handlers, worker_handlers
from .inference import InferenceFace
from .router import RouterFace
from .stream import CLOSE_S
from .worker import WorkerFace

if TYPE_CHECKING:
    from .public import Health


class Server:
    """A server that listens. `address` is host:port as bound, `port` its number (the one taken, if 0 was asked for)."""

    def __init__(self, server: grpc.aio.Server, address: str, port: int, active: Active, health: Health | None) -> None:
        self.address = address
        self.port = port
        self._server = server
        self._active = active
        self._health = health

    async def set_serving(self, serving: bool) -> None:
        """What `grpc.health.v1` answers for "" and for `diptych.v1.Inference`; NOT_SERVING until told otherwise."""
        if self._health is not None:
            await self._health.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let those under way end for up to `grace_s` seconds, then cancel them. When this returns every call has
        ended (faces get `CLOSE_S` to clean up) and the port is free."""
        if self._health is not None:
            await self._health.end()
        await self._server.stop(grace_s)
        if self._active:
            await asyncio.wait(set(self._active), timeout=CLOSE_S)


async def serve(
    address: str,
    *,
    worker: WorkerFace | None = None,
    router: RouterFace | None = None,
    inference: InferenceFace | None = None,
    max_message_bytes: int = INTERNAL_MESSAGE_BYTES,
    write_timeout_s: float = 30.0,
    tenant_of: TenantOf = everybody,
    tls: TlsFiles | None = None,
    streams: int | None = None,
) -> Server:
    """Serve the faces given at `address` (host:port; port 0 takes a free one).

    `streams`: calls that one connection of a client may have under way; more wait at the client, and an idle connection is ended. Messages
    from clients larger than `max_message_bytes` are refused. A client of Generate that takes nothing for
    `write_timeout_s` seconds is cut; `tenant_of` says whose a call of the public face is, or refuses it (health and reflection are for
    all). `tls`: of this server, and if it has an authority, of all who may come; without, it speaks plainly. Raises `ConfigError` with
    field "address" if the port is in use or the host unknown.
    """
    host = await _bindable(address)
    wanted = split_address(address)[1]
    _probe(host, wanted)  # before there is a server: one that was never started complains when it is collected
    active: Active = set()
    server = grpc.aio.server(options=[*server_options(max_message_bytes), *(public_options(streams) if streams else ())])
    if worker is not None:
        server.add_generic_rpc_handlers((worker_handlers(worker, active),))
    if router is not None:
        server.add_generic_rpc_handlers((router_handlers(router, active),))
    health = None
    if inference is not None:
        server.add_generic_rpc_handlers((inference_handlers(inference, active, write_timeout_s, tenant_of),))
        from .public import add_health_and_reflection  # here: workers run where its packages are not installed

        health = await add_health_and_reflection(server)
    port = _bind(server, host, wanted, None if tls is None else server_credentials(tls))
    await server.start()
    return Server(server, join_address(host, port), port, active, health)


async def _bindable(address: str) -> str:
    """The one IP address to bind: for a name with several, grpc would be content with any one that is free."""
    host, port = split_address(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(
            f"The host of {address} is unknown ({error.strerror}); name an address of this machine.", field="address"
        ) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    address = join_address(host, port)
    try:
        return server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _cannot_listen(host, port, str(error)) from None


def _probe(host: str, port: int) -> None:
    """Try the address first: the system says why it cannot be had, where grpc says only that it failed (and prints to stderr)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as grpc does: connections in TIME_WAIT do not matter
            probe.bind((host, port))
    except OSError as error:
        raise _cannot_listen(host, port, error.strerror or str(error)) from None


def _cannot_listen(host: str, port: int, reason: str) -> ConfigError:
    return ConfigError(
        f"Cannot listen on {join_address(host, port)}: {reason}. Stop what uses port {port}, or choose another (0 takes a free one).",
        field="address",
    )
