"""The router as it runs: both faces on their ports, over one service and one view of the fleet.

The supervisor speaks to a third port, on loopback only: who may ask for tokens may not say who serves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from ..core.clock import MonotonicClock
from ..core.config import LimitsSection
from ..core.errors import ConfigError
from ..core.metrics import Recorder
from ..core.model import read_card
from ..rpc.server import Server as RpcServer
from ..rpc.server import serve
from .connection import limited_protocol
from .fleet import FleetView
from .http import make_app
from .link import SILENCE_S
from .placement import Policy
from .service import HOLD_S, Service
from .text import Text

KEEP_ALIVE_S = 65
"""Idle connections are kept longer than clients keep them (httpx 5 s, proxies mostly 60 s), so that it is they who close."""

BACKLOG = 2048
"""Connections waiting to be accepted; more are refused by the system."""
SEND_BUFFER = 128 << 10
"""Bytes the system keeps for a client that does not read (Linux doubles it). By default it grows to 4 MB, and a request whose client
has stopped reading would go on for that long."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What a router is told at its start. Port 0 takes a free one. `model_name` None: the card's."""

    model_dir: Path
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    model_name: str | None = None
    chat_template: Path | None = None
    policy: Policy = field(default_factory=Policy)
    limits: LimitsSection = field(default_factory=LimitsSection)
    silence_s: float = SILENCE_S
    hold_s: float = HOLD_S


class Router:
    """A router that serves. `http`, `grpc` and `control` are the addresses as bound (host:port); `control` takes the fleet."""

    def __init__(
        self,
        http: str,
        service: Service,
        fleet: FleetView,
        web: _WebServer,
        listening: socket.socket,
        rpc: RpcServer,
        control: RpcServer,
    ) -> None:
        self.http = http
        self.grpc = rpc.address
        self.control = control.address
        self.service = service
        self.fleet = fleet
        self._rpc = rpc
        self._control = control
        self._web = web
        self._web_task = asyncio.create_task(web.serve([listening]))
        self._fleet_task = asyncio.create_task(self._follow_fleet())

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end for up to `grace_s` seconds, end the rest with an error, and free the ports."""
        self._fleet_task.cancel()
        await asyncio.gather(self._fleet_task, return_exceptions=True)
        await self._rpc.set_serving(False)
        await self.service.stop(grace_s)
        self._web.should_exit = True
        await asyncio.gather(self._rpc.stop(1.0), self._control.stop(0.0), self._web_task)
        await self.fleet.close()
        self.service.text.close()

    async def _follow_fleet(self) -> None:
        """Who waits for a worker is told, and gRPC's health says what `/health` says: whether a request could be served."""
        while True:
            await self.fleet.changed.wait()
            self.fleet.changed.clear()
            self.service.fleet_changed()
            await self._rpc.set_serving(self.service.unavailable() is None)


class _WebServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process that runs the router has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def start_router(settings: RouterSettings, *, recorder: Recorder, metrics_text: Callable[[], bytes]) -> Router:
    """Read the model's card, tokenizer and template, and serve. `metrics_text`: all metrics in Prometheus' text format.

    Raises `ModelError` for a model that cannot be read, `ConfigError` naming the key for a port that cannot be had.
    """
    card = await asyncio.to_thread(read_card, settings.model_dir)
    text = await asyncio.to_thread(Text.load, settings.model_dir, card, settings.chat_template)
    listening = _listen(settings.host, settings.http_port)
    fleet = FleetView(recorder, silence_s=settings.silence_s)
    service = Service(
        text, fleet, name=settings.model_name or card.name, policy=settings.policy, limits=settings.limits, recorder=recorder,
        clock=MonotonicClock(), hold_s=settings.hold_s,
    )  # fmt: skip
    limits = settings.limits
    try:
        rpc = await serve(
            _address(settings.host, settings.grpc_port), inference=service, max_message_bytes=limits.body_bytes,
            write_timeout_s=limits.write_s,
        )  # fmt: skip
    except ConfigError as error:
        listening.close()
        raise ConfigError(f"router.grpc_port {settings.grpc_port}: {error.message}", field="router.grpc_port") from error
    control = await serve("127.0.0.1:0", router=fleet)
    web = _WebServer(
        uvicorn.Config(
            make_app(service, metrics_text), http=limited_protocol(read_s=limits.write_s, write_s=limits.write_s), ws="none",
            lifespan="off", log_config=None, access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
    )  # fmt: skip
    web.config.load()
    return Router(_address(settings.host, listening.getsockname()[1]), service, fleet, web, listening, rpc, control)


async def run_router(
    settings: RouterSettings,
    *,
    recorder: Recorder,
    metrics_text: Callable[[], bytes],
    ready: Callable[[Router], None],
    stop: asyncio.Event,
    grace_s: float,
) -> None:
    """`start_router`, tell `ready`, and end gracefully when `stop` is set."""
    router = await start_router(settings, recorder=recorder, metrics_text=metrics_text)
    ready(router)
    await stop.wait()
    await router.stop(grace_s)


def _listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; `ConfigError` naming `router.http_port` or `router.host` if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"router.host {host!r} is not an address of this machine: {error}.", field="router.host") from None
    listening = socket.socket(family, kind, protocol)
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


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
