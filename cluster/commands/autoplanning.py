"""Planning again while a cluster serves: joins who looks and decides with what there is to see and to change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from ...core.clock import MonotonicClock
from ...core.config import ClusterConfig
from ...core.errors import DiptychError, Unavailable
from ...core.fleet import Phase
from ...core.workload import Window
from ..autoplan.pilot import Cluster, Pilot
from ..autoplan.replan import Split
from ..process.launcher import child_environment
from ..supervising.control import Numbers
from ..supervising.state import ClusterState
from ..supervising.supervisor import Supervisor

SHOWN = 5
"""Decisions that `diptych status` shows."""
log = logging.getLogger(__name__)


class Record(Protocol):
    """Where it is written down what the cluster is."""

    state: ClusterState

    def update(self, **changes: Any) -> None: ...


class Scale(Protocol):
    """See `Crew.scale`."""

    async def __call__(self, wanted: Numbers, tell: Callable[[str], None], *, in_place: bool = False) -> None: ...


async def keep_planned(
    config: ClusterConfig,
    cores: int,
    supervisor: Supervisor,
    record: Record,
    scale: Scale,
    recorded: Callable[..., Awaitable[Window]],
    stop: asyncio.Event,
) -> None:
    """Until the cluster begins to end (`stop`), if the config asks for it. `cores`: those of this host that it may use. `recorded`: see
    `publish.recorded`."""
    mode = config.autoplan.mode
    if mode == "off":
        return
    await supervisor.all_ready.wait()

    async def window(seconds: float) -> Window:
        state = record.state
        if state.control is None:
            raise Unavailable("There is no router to ask.")
        return await recorded(state.control, seconds, **({} if state.internal_tls is None else {"tls": state.internal_tls}))

    def split() -> Split:
        serving = [post.phase for post in supervisor.workers if not post.given_up and not post.leaving]
        return Split(serving.count(Phase.PREFILL), serving.count(Phase.DECODE))

    async def change(wanted: Split) -> None:
        before = split()
        try:
            await scale(_numbers(wanted), log.info, in_place=wanted.workers <= before.workers)
        except DiptychError as error:
            await scale(_numbers(before), log.info, in_place=True)
            raise Unavailable(f"could not be changed to {wanted}, so it is {before} again: {error.message}") from error

    def show(said: str) -> None:
        now = datetime.now(UTC).strftime("%H:%M:%S")
        record.update(autoplan=(*record.state.autoplan, f"({mode}) {now} {said}")[-SHOWN:])

    show("looks at the load")
    pilot = Pilot(config, Cluster(window, split, change, show), cores, child_environment(record.state.id), MonotonicClock())
    flight = asyncio.create_task(pilot.run())
    try:
        await stop.wait()
    finally:
        flight.cancel()
        await asyncio.gather(flight, return_exceptions=True)


def _numbers(split: Split) -> Numbers:
    return {Phase.PREFILL: (split.prefills,), Phase.DECODE: (split.decodes,)}
