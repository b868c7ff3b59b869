"""A cluster of real processes under a load of all kinds, and what its processes hold while it lasts."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from diptych.cluster.process.spec import BLOCK_SIZE, RouteSpec
from diptych.core.fleet import Fleet, LocalPrefill, WorkerReport
from diptych.core.generate import Chunk, Generate
from diptych.core.layout import CacheGroup
from diptych.core.sampling import SamplingParams
from diptych.rpc.inference import InferenceClient
from diptych.rpc.router import RouterClient
from e2e_harness import Rank
from router_harness import member

Answer = tuple[tuple[str, str], ...]
"""Of each choice: its text and why it ended."""


@dataclass(frozen=True)
class Job:
    """A request whose answer is always the same: its seed is given."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    stop: tuple[str, ...] = ()


def jobs(order: random.Random, count: int, *, longest: int, most: int) -> list[Job]:
    """Prompts of 5 to `longest` tokens, half of them with one of three beginnings in common; up to `most` tokens of output, seldom many.
    The first is nearly twice as long: hardly anything fits beside it."""
    heads = [[order.randrange(3, 512) for _ in range(length)] for length in (32, 70, 100)]

    def job(number: int) -> Job:
        head = order.choice(heads) if order.random() < 0.5 else []
        tail = [order.randrange(3, 512) for _ in range(order.randrange(5, max(6, longest - len(head))))]
        sampling: dict[str, Any] = {"max_tokens": order.choice([1, 8, most // 3, most // 2, order.randint(1, most)]), "seed": number}
        sampling |= order.choice(
            [{"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 40, "top_p": 0.9}, {"min_p": 0.02}]
        )
        sampling |= order.choice([{}, {}, {"repetition_penalty": 1.2, "frequency_penalty": 0.5}, {"presence_penalty": 1.0}])
        sampling |= order.choice([{"ignore_eos": True}, {"ignore_eos": True}, {}, {"stop_token_ids": [*range(3, 512, 40)]}])
        if order.random() < 0.2:
            sampling |= {"n": order.randint(2, 4), "max_tokens": min(sampling["max_tokens"], most // 3)}
        return Job((2, *head, *tail), sampling, stop=("the", "e", "\n") if order.random() < 0.2 else ())

    large = Job((2, *(order.randrange(3, 512) for _ in range(2 * longest - 20))), {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True})
    return [large, *(job(number) for number in range(1, count))]


class GrpcFace:
    """Asks over gRPC. `kv_bytes` were sent from P to D; `saved_bytes` were not, because D had that prefix."""

    def __init__(self, address: str, groups: Sequence[CacheGroup]) -> None:
        self._client = InferenceClient(address)
        self._groups = groups
        self.saved_bytes = self.kv_bytes = 0
        self.pairs: Counter[tuple[str, str]] = Counter()

    async def ask(self, job: Job, leave_after: int | None) -> Answer | None:
        """The answer; None if it was left after so many messages."""
        sampling = {**job.sampling, "stop_token_ids": tuple(job.sampling.get("stop_token_ids", ()))}
        call = Generate(job.prompt, sampling=SamplingParams(**sampling), stop=job.stop)
        texts: dict[int, list[str]] = {}
        reasons: dict[int, str] = {}
        async with aclosing(self._client.generate(call)) as chunks:
            async for chunk in chunks:
                texts.setdefault(chunk.choice, []).append(chunk.text)
                if chunk.reason is not None:
                    reasons[chunk.choice] = chunk.reason.value
                if chunk.finish is not None:
                    self._note(chunk, len(job.prompt))
                elif leave_after is not None and (leave_after := leave_after - 1) <= 0:
                    return None
        return tuple(("".join(texts[choice]), reasons[choice]) for choice in sorted(reasons))

    def _note(self, chunk: Chunk, tokens: int) -> None:
        assert chunk.finish is not None
        timing = chunk.finish.timing
        assert timing.attempts == 1, f"it took {timing.attempts} attempts"
        if timing.transport:
            self.pairs[timing.prefill_worker, timing.decode_worker] += 1
            self.kv_bytes += timing.kv_bytes
            self.saved_bytes += sum(_lacking(group, tokens) for group in self._groups) - timing.kv_bytes

    async def close(self) -> None:
        await self._client.close()


def _lacking(group: CacheGroup, tokens: int) -> int:
    """Bytes of what a D without any prefix lacks of a prompt."""
    return (tokens - group.first_needed(tokens) // BLOCK_SIZE * BLOCK_SIZE) * group.token_bytes * len(group.layers)


class HttpFace:
    """Asks over HTTP, streamed or whole. `unheard`: requests left before anything of the answer came, perhaps before the router had
    read them."""

    def __init__(self, address: str) -> None:
        self.unheard = 0
        self._client = httpx.AsyncClient(base_url=f"http://{address}", timeout=120.0)

    async def ask(self, job: Job, leave_after: int | None, *, stream: bool) -> Answer | None:
        body = {"prompt": list(job.prompt), **job.sampling, "stream": stream, "stop": list(job.stop)}
        if stream:
            return await self._stream(body, leave_after)
        try:
            async with asyncio.timeout(leave_after and leave_after * 0.05):
                answer = await self._client.post("/v1/completions", json=body)
        except TimeoutError:
            self.unheard += 1
            return None
        assert answer.status_code == 200, answer.text
        return _answer(answer.json()["choices"])

    async def _stream(self, body: dict[str, Any], leave_after: int | None) -> Answer | None:
        parts: list[dict[str, Any]] = []
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return _answer(parts)
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    parts += event["choices"]
                    if leave_after is not None and (leave_after := leave_after - 1) <= 0:
                        return None
        raise AssertionError("the stream ended without [DONE]")

    async def counted(self, name: str) -> float:
        """A counter of the router's, over all its labels."""
        lines = (await self._client.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    async def close(self) -> None:
        await self._client.aclose()


def _answer(parts: Iterable[dict[str, Any]]) -> Answer:
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for part in parts:
        texts[part["index"]] = texts.get(part["index"], "") + part["text"]
        if part["finish_reason"]:
            reasons[part["index"]] = part["finish_reason"]
    return tuple((texts[choice], reasons[choice]) for choice in sorted(reasons))


@dataclass(frozen=True)
class Sample:
    """What one process holds at one moment. Bytes of the kernel's account; not its PSS, which grows when another that maps the same
    libraries ends."""

    at: float
    rss: int
    anonymous: int
    descriptors: int
    threads: int


def sample(pid: int) -> Sample:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    account = {name: int(amount.split()[0]) * 1024 for name, amount in (line.split(":") for line in lines)}
    descriptors, threads = (sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir()) for what in ("fd", "task"))
    return Sample(time.monotonic(), account["Rss"], account["Anonymous"], descriptors, threads)


@dataclass
class Holdings:
    """Samples of all processes, taken once a second while a load lasts."""

    pids: dict[str, int]
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    async def watch(self, every_s: float) -> None:
        while True:
            self.take()
            await asyncio.sleep(every_s)

    def take(self) -> None:
        for name, pid in self.pids.items():
            self.samples.setdefault(name, []).append(sample(pid))

    def growth(self, name: str, what: str) -> float:
        """The median of the last quarter of the samples less that of the first."""
        values = [getattr(each, what) for each in self.samples[name]]
        quarter = max(1, len(values) // 4)
        return median(values[-quarter:]) - median(values[:quarter])

    def curve(self, name: str, what: str, points: int = 8) -> list[float]:
        values = [getattr(each, what) for each in self.samples[name]]
        return values[:: max(1, len(values) // points)]


@dataclass
class Cluster:
    """Ranks, and a router process that knows them."""

    ranks: Sequence[Rank]
    router: subprocess.Popen[bytes]
    http: str
    grpc: str
    control: RouterClient

    @property
    def pids(self) -> dict[str, int]:
        return {**{rank.spec.worker_id: rank.process.pid for rank in self.ranks}, "router": self.router.pid}

    async def reports(self) -> dict[str, WorkerReport]:
        return {report.worker_id: report for report in (await self.control.describe())[1]}

    async def rest(self) -> dict[str, WorkerReport]:
        """Wait until nobody holds anything, and every rank has found so itself."""
        async with asyncio.timeout(60):
            while True:
                reports = await self.reports()
                if len(reports) == len(self.ranks) and all(_at_rest(report) for report in reports.values()):
                    return reports
                await asyncio.sleep(0.1)


def _at_rest(report: WorkerReport) -> bool:
    held = (report.waiting, report.running, report.leases, report.blocks_total - report.blocks_free)
    return not any(held) and dict(report.counters).get("diptych_worker_idle_checks_total", 0) > 0


def start_router(model_dir: Path, directory: Path) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """A router in a process of its own, and what it says when it is ready. It leaves short prompts to the decode workers."""
    spec = RouteSpec(model_dir=model_dir, local_prefill=LocalPrefill.AUTO, local_prefill_below=24, log_level="warning")
    with (directory / "router.log").open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "diptych.cluster.programs.route", "--spec", spec.model_dump_json(), "--leash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            cwd=directory,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
    assert process.stdout is not None
    for line in process.stdout:
        if (event := json.loads(line))["event"] == "ready":
            return process, event
    raise AssertionError((directory / "router.log").read_text())


@asynccontextmanager
async def cluster(ranks: Sequence[Rank], directory: Path) -> AsyncIterator[Cluster]:
    router, ready = start_router(ranks[0].spec.model_dir, directory)
    try:
        async with AsyncExitStack() as stack:
            control = RouterClient(ready["control"])
            stack.push_async_callback(control.close)
            running = Cluster(ranks, router, ready["http"], ready["grpc"], control)
            await control.publish(Fleet(1, tuple(member(rank) for rank in ranks)))
            async with asyncio.timeout(60):
                while len(await running.reports()) < len(ranks):  # noqa: ASYNC110  it watches what has no event
                    await asyncio.sleep(0.05)
            yield running
    finally:
        router.kill()
        router.communicate()
