"""The supervisor's line to the router."""

from __future__ import annotations

from typing import Any

from ..core.fleet import Fleet
from ..rpc.router import RouterClient


class RouterConnection:
    """Publishes to the router that has said `ready`; a `Publisher`."""

    def __init__(self, ready: dict[str, Any]) -> None:
        self._client = RouterClient(str(ready["control"]))

    async def publish(self, fleet: Fleet) -> int:
        return await self._client.publish(fleet)

    async def live(self) -> set[str]:
        """Ids of the workers whose reports the router has."""
        _, reports = await self._client.describe()
        return {report.worker_id for report in reports}

    async def close(self) -> None:
        await self._client.close()
