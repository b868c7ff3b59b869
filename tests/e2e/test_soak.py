"""Several workers of each phase at capacity, through the real router: no error, the same answers, nothing that grows, nobody starves.

The gate runs each shape for 30 s, the nightly tests for half an hour. One of these alone (they may run side by
side):

    python -m pytest tests/e2e/test_soak.py -m nightly -k 2P2D
    python -m pytest tests/e2e/test_soak.py -m nightly -k 3P1D

`-s` shows what was counted and how memory went; `SOAK_SECONDS` sets another duration.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from diptych.core.fleet import Phase, WorkerReport
from diptych.core.layout import CacheGroup
from diptych.core.model import read_card
from diptych.decode_worker.admission import MAX_PASSES
from e2e_harness import Rank, rank_spec, ranks
from soak_harness import Answer, Cluster, GrpcFace, Holdings, HttpFace, Job, cluster, jobs

AT_ONCE = 24
"""Requests in the cluster: three times what its pools hold."""
MiB = 1 << 20
MOST_PASSED = 10 * (AT_ONCE + 2 * MAX_PASSES)
"""Requests that may end while one is under way; who starves is passed without end. 224 were counted in a minute: a preempted one is
recomputed. A count and no time, so that a machine with other work changes nothing."""
MAY_GROW = {"anonymous": 6 * MiB, "rss": 6 * MiB, "descriptors": 6, "threads": 2}
"""From the first quarter of the time after warm-up to the last. Half an hour is some 40,000 requests: a router that kept 160 bytes of
each would grow by 6 MiB; it keeps about 10, and its heap takes some 20,000 requests to find its size."""

SHAPES = {"2P2D": ("tiny_gemma3_dir", 2, 2), "3P1D": ("tiny_llama_dir", 3, 1)}


@dataclass
class Load:
    """Asks and asks; keeps each job's answer, and how many others ended while each request was under way."""

    cluster: Cluster
    jobs: list[Job]
    order: random.Random
    groups: Sequence[CacheGroup]
    answers: dict[int, Answer] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    passed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grpc, self.http = GrpcFace(self.cluster.grpc, self.groups), HttpFace(self.cluster.http)

    async def keep_up(self, at_once: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._go_on(until) for _ in range(at_once)))

    async def _go_on(self, until: float) -> None:
        while time.monotonic() < until:
            await self.one()

    async def one(self) -> None:
        """A request over one of the faces; one in four is left on the way. Answers must be the same every time, over either face."""
        await self.ask(self.order.randrange(len(self.jobs)), self.order.randint(1, 20) if self.order.random() < 1 / 4 else None)

    async def ask(self, number: int, leave_after: int | None = None) -> None:
        """Job `number`, which may be left after so many messages."""
        job, before = self.jobs[number], self.ended.total()
        match self.order.choice(["grpc", "stream", "whole"]):
            case "grpc":
                answer = await self.grpc.ask(job, leave_after)
            case face:
                answer = await self.http.ask(job, leave_after, stream=face == "stream")
        self.ended["whole" if answer else "left"] += 1
        self.passed.append(self.ended.total() - before)
        if answer is not None:
            assert answer == self.answers.setdefault(number, answer), f"job {number} had another answer before: {job}"

    async def again(self, count: int) -> None:
        """Answers given under load are those given when there is nobody else."""
        for number in self.order.sample(sorted(self.answers), min(count, len(self.answers))):
            assert await self.grpc.ask(self.jobs[number], None) == self.answers[number]

    async def close(self) -> None:
        await self.grpc.close()
        await self.http.close()


def total(reports: dict[str, WorkerReport], name: str, phase: str = "") -> float:
    return sum(
        dict(report.counters).get(f"diptych_worker_{name}_total", 0.0) for report in reports.values() if report.worker_id.startswith(phase)
    )


async def soak(started: list[Rank], directory: Path, seconds: float) -> None:
    order = random.Random(7)
    async with cluster(started, directory) as running:
        load = Load(running, jobs(order, 60, longest=150, most=80), order, read_card(started[0].spec.model_dir).cache_groups())
        holdings = Holdings(running.pids)
        try:
            await load.keep_up(AT_ONCE, seconds / 4)
            watch = asyncio.create_task(holdings.watch(max(0.5, seconds / 200)))
            began, before = time.monotonic(), sum(load.ended.values())
            await asyncio.gather(load.keep_up(AT_ONCE, seconds * 3 / 4), load.ask(0))  # the large one, whatever is drawn
            rate = (sum(load.ended.values()) - before) / (time.monotonic() - began)
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            reports = await running.rest()
            await load.again(10)
            assert await load.http.counted("diptych_requests_total") >= sum(load.ended.values()) - load.http.unheard
            assert await load.http.counted("diptych_retries_total") == 0, "every attempt was the only one"
        finally:
            await load.close()
    told = {
        "ended": dict(load.ended),
        "rate": rate,
        "most_passed": max(load.passed),
        "saved": load.grpc.saved_bytes,
        "sent": load.grpc.kv_bytes,
    }
    told |= {name: total(reports, name) for name in ("preemptions", "recomputed_tokens", "checks", "idle_checks", "transfers_failed")}
    told["growth"] = {name: {what: holdings.growth(name, what) for what in MAY_GROW} for name in running.pids}
    told["curves"] = {name: [round(value / MiB, 2) for value in holdings.curve(name, "anonymous")] for name in running.pids}
    print(json.dumps(told, indent=1))
    _judge(load, reports, holdings, seconds)


def _judge(load: Load, reports: dict[str, WorkerReport], holdings: Holdings, seconds: float) -> None:
    assert min(load.ended["whole"], load.ended["left"]) > seconds / 10, load.ended
    assert len(load.grpc.pairs) == sum(name.startswith("p") for name in reports) * sum(name.startswith("d") for name in reports)
    assert 0 in load.answers, "the large one never had its turn"
    assert total(reports, "preemptions", "d") > 0
    assert total(reports, "recomputed_tokens", "d") > 0
    assert total(reports, "local_prefill_tokens", "d") > 0
    assert total(reports, "cached_tokens", "d") > 0
    assert load.grpc.saved_bytes > 0, "D has prefixes of its own, which are not sent"
    for name, report in reports.items():
        assert total({name: report}, "checks") > seconds, f"{name} did not check its books throughout"
    assert max(load.passed) < MOST_PASSED, f"{max(load.passed)} requests ended while one was under way"
    for name in holdings.pids:
        for what, limit in MAY_GROW.items():
            growth = holdings.growth(name, what)
            assert growth <= limit, f"{name}: {what} grew by {growth} in {seconds} s: {holdings.curve(name, what)}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(30.0, marks=pytest.mark.timeout(240), id="the gate"),
        pytest.param(1800.0, marks=[pytest.mark.nightly, pytest.mark.timeout(2400)], id="half an hour"),
    ],
)
def test_at_capacity(shape: str, seconds: float, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, prefills, decodes = SHAPES[shape]
    seconds = float(os.environ.get("SOAK_SECONDS", seconds))
    small = {"log_level": "warning"}
    names = [(Phase.PREFILL, f"p{i}", {"kv_tokens": 320 + 96 * i, "chunk_tokens": 40 + 30 * i}) for i in range(prefills)]
    names += [(Phase.DECODE, f"d{i}", {"kv_tokens": 400 + 160 * i, "chunk_tokens": 32}) for i in range(decodes)]
    specs = [rank_spec(request.getfixturevalue(model), phase, name, **small, **sizes) for phase, name, sizes in names]
    with ranks(tmp_path, *specs) as started:
        asyncio.run(soak(started, tmp_path, seconds))
        assert all(rank.alive for rank in started)
