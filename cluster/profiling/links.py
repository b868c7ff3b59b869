"""The ways for KV to move between two workers of this host, each timed between two processes by the hinge's own code."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from ...core.errors import DiptychError, Unavailable
from ...core.layout import Layout
from ...core.transfer import Transport
from ..planner.fitting import fit
from ..planner.profile import Link, Residuals
from ..programs.rank import see_gpu
from .ends import Here, two_ends

TOKENS = (16, 32, 64, 160, 320, 480)
"""Of the transfers that are timed, whole blocks; a model with a shorter context has those that it can hold."""
LONGEST_S = 120.0
"""For all of one transport, which takes some 3 s."""
SKIPPED = 3
"""Runs that meet pages and connections nobody has touched."""


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Of one transport, medians in seconds. `message`: one way; `transfers`: bytes, and the time from KV stored and committed until the
    source may free it, in which two messages are."""

    message: float
    transfers: tuple[tuple[int, float], ...]


def timed_link(layout: Layout, transport: Transport, runs: int, gpus: Sequence[str] = ()) -> LinkTimes:
    """`layout`: a pool with room for each of `TOKENS` that fits. `gpus`: where there are several, between the first two; from one there it
    goes to another place on it. In processes of its own, so that this one has nothing on a GPU. Raises what keeps KV from moving, as
    `DiptychError`."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        try:
            return executor.submit(_timed, layout, transport, runs, tuple(gpus[:2])).result()
        except DiptychError:
            raise
        except Exception as error:  # of the device, or the process has died: the other links are timed all the same
            raise Unavailable(f"{type(error).__name__}: {error}") from error


def _timed(layout: Layout, transport: Transport, runs: int, gpus: Sequence[str]) -> LinkTimes:
    if transport.on_gpu:
        see_gpu(gpus[0])
    try:
        return asyncio.run(_between_two(layout, transport, runs, gpus[-1] if gpus else None))
    except TimeoutError:
        raise Unavailable(f"Transfers over {transport.value} were not through within {LONGEST_S:g} s.") from None


async def _between_two(layout: Layout, transport: Transport, runs: int, gpu: str | None) -> LinkTimes:
    async with asyncio.timeout(LONGEST_S), two_ends(layout, transport, Here, gpu=gpu) as here:
        grants = [await here.grant_time() for _ in range(runs + SKIPPED)]
        transfers = []
        for tokens in TOKENS:
            if tokens <= min(layout.num_blocks) * layout.block_size:
                before = here.moved
                taken = [await here.hand_over_time(tokens) for _ in range(runs + SKIPPED)]
                transfers.append(((here.moved - before) // len(taken), statistics.median(taken[SKIPPED:])))
    return LinkTimes(statistics.median(grants[SKIPPED:]) / 2, tuple(transfers))


def link_of(times: LinkTimes) -> tuple[Link, Residuals]:
    """Time by size, as a line; what two messages take of its constant is not the link's. `ConfigError` for fewer than three sizes."""
    (constant, per_byte), residuals = fit([(1.0, size) for size, _ in times.transfers], [taken for _, taken in times.transfers])
    size, taken = times.transfers[-1]
    return Link(bytes_per_s=1 / per_byte if per_byte else size / taken, latency=max(0.0, constant - 2 * times.message)), residuals
