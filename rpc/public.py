"""What only the public service has beside it: `grpc.health.v1` and reflection. Workers run where these two packages are not."""

from __future__ import annotations

from typing import Protocol

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .handlers import INFERENCE


class _Servicer(Protocol):
    async def set(self, service: str, status: int) -> None: ...

    async def enter_graceful_shutdown(self) -> None: ...


class Health:
    """The health of a server and of `diptych.v1.Inference`: NOT_SERVING until told otherwise."""

    def __init__(self, servicer: _Servicer) -> None:
        self._servicer = servicer

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", INFERENCE.full_name):
            await self._servicer.set(service, status)

    async def end(self) -> None:
        """NOT_SERVING from now on, whatever is said later."""
        await self._servicer.enter_graceful_shutdown()


async def add_health_and_reflection(server: grpc.aio.Server) -> Health:
    servicer: _Servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    added = Health(servicer)
    await added.set_serving(False)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((INFERENCE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return added
