"""Ranks that stop themselves at a chosen point of their life (`pausing_rank`), as a test sees them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

from diptych.cluster.process.spec import RankSpec
from rank_process import Rank


def start(spec: RankSpec, directory: Path) -> Rank:
    """A rank that can be stopped at a point by `arm` with the same directory, as can those that follow it; not yet ready."""
    points = directory / "points"
    points.mkdir(exist_ok=True)
    return Rank.start(spec, directory, program=(str(Path(__file__).with_name("pausing_rank.py")), str(points)))


def arm(directory: Path, point: str, passes: int) -> None:
    """The first rank to have passed `point` so often stops there."""
    path = directory / "points" / point
    path.with_suffix(".new").write_text(str(passes))
    path.with_suffix(".new").rename(path)


async def stopped(ranks: Iterable[Rank]) -> Rank:
    """Who of these processes has stopped itself. (For those that follow see `Rank.members`.)"""
    watched = list(ranks)
    while True:
        for rank in watched:
            if os.waitid(os.P_PID, rank.process.pid, os.WSTOPPED | os.WNOHANG):  # noqa: ASYNC222  it does not wait
                return rank
        await asyncio.sleep(0.005)
