"""The supervisor's lines to the router and to the workers."""

from __future__ import annotations

from typing import Any

from ...core.fleet import Fleet
from ...core.security import TlsFiles
from ...core.workload import Window
from ...rpc.router import RouterClient
from ...rpc.worker import WorkerClient


class RouterConnection:
    """Publishes to the router that has said `ready`; a `Publisher`."""

    def __init__(self, ready: dict[str, Any], tls: TlsFiles | None = None) -> None:
        self._client = RouterClient(str(ready["control"]), tls)

    async def publish(self, fleet: Fleet) -> int:
        return await self._client.publish(fleet)

    async def live(self) -> set[str]:
        """Ids of the workers whose reports the router has."""
        _, reports = await self._client.describe()
        return {report.worker_id for report in reports}

    async def close(self) -> None:
        await self._client.close()


async def recorded(control: str, seconds: float, tls: TlsFiles | None = None) -> Window:
    """What the router at `control` has recorded of the last `seconds`. Raises `DiptychError` if it cannot be reached."""
    async with RouterClient(control, tls) as client:
        return await client.window(seconds)


async def drain_worker(address: str, within_s: float, tls: TlsFiles | None = None) -> int:
    """Have the worker at `address` take nothing new and finish; the number of attempts it could not. Raises `DiptychError` if it
    cannot be reached."""
    async with WorkerClient(address, tls) as client:
        return await client.drain(within_s)
