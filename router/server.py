"""The router as it runs: both faces on their ports, over one service and one view of the fleet.

The supervisor speaks to a third port, on loopback only: who may ask for tokens may not say who serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from ..core.clock import MonotonicClock
from ..core.config import LimitsSection
from ..core.errors import ConfigError
from ..core.fleet import Fleet, WorkerReport
from ..core.metrics import Recorder
from ..core.model import read_card
from ..core.security import JwtSection, TlsFiles
from ..core.tls import reloading_context
from ..core.workload import Window
from ..rpc.handlers import TenantOf, everybody
from ..rpc.server import Server as RpcServer
from ..rpc.server import serve
from .connection import limited_protocol
from .fleet import FleetView
from .http import make_app
from .keys import KeyRing
from .link import SILENCE_S
from .listening import listen
from .placement import Policy
from .recording import RecordFile, keep_written
from .service import HOLD_S, Service
from .text import Text

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 65
"""Idle connections are kept longer than clients keep them (httpx 5 s, proxies mostly 60 s), so that it is they who close."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What a router is told at its start. Port 0 takes a free one. `model_name` None: the card's. `api_keys` and `jwt` None: nobody
    is asked who he is. `tls`: of both faces; `internal_tls`: of itself towards workers and supervisor. Without them it speaks plainly.
    `record`: a file for the workload, as long as `recording.RecordFile` makes it."""

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
    api_keys: Path | None = None
    jwt: JwtSection | None = None
    open_metrics: bool = True
    tls: TlsFiles | None = None
    internal_tls: TlsFiles | None = None
    record: Path | None = None
    record_bytes: int = 64 << 20


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
        follow: Sequence[Follow],
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
        self._following = [asyncio.create_task(each()) for each in (self._follow_fleet, *follow)]
        for task in self._following:
            task.add_done_callback(_tell_of_a_defect)

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end for up to `grace_s` seconds, end the rest with an error, and free the ports."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
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


def _tell_of_a_defect(task: asyncio.Task[None]) -> None:
    """Who follows ends by being cancelled, and else nobody would know that it has ended."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a defect in the router: it follows something no more", exc_info=error)


class _WebServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process that runs the router has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Follow = Callable[[], Coroutine[Any, Any, None]]
"""Keeps up with something until cancelled: keys that are elsewhere, a file to be written."""


async def _who_asks(settings: RouterSettings) -> tuple[TenantOf, list[Follow]]:
    """And what is to be followed: a file of API keys is looked at by each request."""
    if settings.jwt is not None:
        from .doors import open_doors  # with httpx and PyJWT, 0.1 s of a start that few need

        doors = await open_doors(settings.api_keys, settings.jwt)
        return doors.tenant, [doors.follow]
    return (everybody if settings.api_keys is None else KeyRing(settings.api_keys).tenant), []


@dataclass(frozen=True, slots=True)
class _Control:
    """What the supervisor asks; implements `rpc.router.RouterFace`."""

    fleet: FleetView
    service: Service

    def publish(self, fleet: Fleet) -> int:
        return self.fleet.publish(fleet)

    def describe(self) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        return self.fleet.describe()

    def window(self, seconds: float) -> Window:
        return self.service.window(seconds)


async def start_router(settings: RouterSettings, *, recorder: Recorder, metrics_text: Callable[[], bytes]) -> Router:
    """Read the model's card, tokenizer and template, and serve. `metrics_text`: all metrics in Prometheus' text format.

    Raises `ModelError` for a model that cannot be read, `ConfigError` naming the key for a port that cannot be had, and for API keys,
    keys of tokens or certificates that cannot be read.
    """
    card = await asyncio.to_thread(read_card, settings.model_dir)
    text = await asyncio.to_thread(Text.load, settings.model_dir, card, settings.chat_template)
    tenant_of, follow = await _who_asks(settings)
    context = None if settings.tls is None else reloading_context(settings.tls)
    listening = listen(settings.host, settings.http_port, settings.limits.connections)
    fleet = FleetView(recorder, silence_s=settings.silence_s, tls=settings.internal_tls)
    service = Service(
        text, fleet, name=settings.model_name or card.name, policy=settings.policy, limits=settings.limits, recorder=recorder,
        clock=MonotonicClock(), hold_s=settings.hold_s,
    )  # fmt: skip
    if settings.record is not None:
        file = RecordFile(settings.record, settings.record_bytes)
        follow.append(partial(keep_written, service.recording, file, service.oldest))
    limits = settings.limits
    try:
        rpc = await serve(
            _address(settings.host, settings.grpc_port), inference=service, max_message_bytes=limits.body_bytes,
            write_timeout_s=limits.write_s, tenant_of=tenant_of, tls=settings.tls, streams=limits.running,
        )  # fmt: skip
    except ConfigError as error:
        listening.close()
        raise ConfigError(f"router.grpc_port {settings.grpc_port}: {error.message}", field="router.grpc_port") from error

    def looked_at() -> bytes:
        fleet.show()
        return metrics_text()

    control = await serve("127.0.0.1:0", router=_Control(fleet, service), tls=settings.internal_tls)
    web = _WebServer(
        uvicorn.Config(
            make_app(service, looked_at, tenant_of, open_metrics=settings.open_metrics),
            http=limited_protocol(read_s=limits.write_s, write_s=limits.write_s), ws="none",
            lifespan="off", log_config=None, access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
    )  # fmt: skip
    web.config.load()
    web.config.ssl = context
    return Router(_address(settings.host, listening.getsockname()[1]), service, fleet, web, listening, rpc, control, follow)


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


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
