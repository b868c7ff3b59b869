"""A router of our own over real rank processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from diptych.core.fleet import Fleet, LocalPrefill, Member
from diptych.core.metrics import NullRecorder
from diptych.core.model import read_card
from diptych.router.placement import Policy
from diptych.router.server import Router, RouterSettings, start_router
from e2e_harness import Rank


def member(rank: Rank) -> Member:
    ready = rank.wait_for("ready")
    spec = rank.spec
    layout = read_card(spec.model_dir).layout(block_size=16, kv_tokens=spec.kv_tokens)
    return Member(spec.worker_id, rank.address, spec.phase, int(str(ready["incarnation"])), layout, spec.kv_tokens)


@asynccontextmanager
async def router(
    workers: Sequence[Rank], policy: LocalPrefill = LocalPrefill.NEVER, chat_template: Path | None = None
) -> AsyncIterator[Router]:
    settings = RouterSettings(workers[0].spec.model_dir, policy=Policy(policy), chat_template=chat_template)
    running = await start_router(settings, recorder=NullRecorder(), metrics_text=lambda: b"")
    try:
        running.fleet.publish(Fleet(1, tuple(member(rank) for rank in workers)))
        await until(running, lambda: running.service.unavailable() is None and len(running.fleet.describe()[1]) == len(workers))
        yield running
    finally:
        await running.stop(1.0)


async def until(running: Router, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  it watches what has no event
            await asyncio.sleep(0.02)


async def idle(running: Router) -> None:
    """The router has ended every request, and no worker has anything of ours left: nothing runs, no lease is held, every block is free."""
    await until(
        running,
        lambda: (
            running.service.running == 0
            and all(r.running == r.waiting == r.leases == 0 and r.blocks_free == r.blocks_total for r in running.fleet.describe()[1])
        ),
    )
