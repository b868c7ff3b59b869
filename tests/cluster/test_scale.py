"""Workers join and leave under load: no request is lost, and the newcomers get their part of the work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_harness import Cluster, nothing_left, running, scaled, wait_for
from diptych.core.errors import DiptychError
from diptych.core.fleet import Phase
from diptych.core.generate import Generate, Timing
from diptych.core.sampling import SamplingParams
from diptych.rpc.inference import InferenceClient
from prometheus_client.parser import text_string_to_metric_families

UP_S = 90.0
AT_ONCE = 4
TOKENS = 24
SMALL = ("--no-ray", "--http-port", "0", "--grpc-port", "0")
BUSY = ("diptych_requests_running", "vllm:num_requests_running", "vllm:num_requests_waiting")


@dataclass
class Load:
    """`AT_ONCE` clients that ask without a pause. `answers`: what each prompt was first answered with. `turn`: only what has begun since it
    began counts."""

    address: str
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    served: asyncio.Queue[None] = field(default_factory=asyncio.Queue)
    workers: set[str] = field(default_factory=set)
    asks: asyncio.Event = field(default_factory=asyncio.Event)
    asking: int = 0
    turn: int = 0

    async def client(self, number: int) -> None:
        async with InferenceClient(self.address) as client:
            while True:
                await self.asks.wait()
                self.asking += 1
                await self._ask(client, number, self.turn)
                self.asking -= 1

    async def _ask(self, client: InferenceClient, number: int, turn: int) -> None:
        prompt = (2, *(3 + (7 * position + 11 * number) % 500 for position in range(60 + 40 * number)))
        call = Generate(prompt, sampling=SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True))
        tokens: list[int] = []
        workers: set[str] = set()
        try:
            async for chunk in client.generate(call):
                tokens += [token.id for token in chunk.tokens]
                if chunk.finish:
                    workers = {chunk.finish.timing.prefill_worker, chunk.finish.timing.decode_worker}
        except DiptychError as error:
            self.errors.append(f"{error.code}: {error.message}")
            return
        if tuple(tokens) != self.answers.setdefault(number, tuple(tokens)) or len(tokens) != TOKENS:
            self.errors.append(f"another answer: {tokens}")
        if turn == self.turn:
            self.workers |= workers
            self.served.put_nowait(None)

    async def more(self, count: int) -> set[str]:
        """Until `count` requests that begin from now on are served; the workers that served them."""
        self.workers, self.served, self.turn = set(), asyncio.Queue(), self.turn + 1
        async with asyncio.timeout(60):
            for _ in range(count):
                await self.served.get()
        return self.workers


@asynccontextmanager
async def load(address: str) -> AsyncIterator[Load]:
    load = Load(address)
    load.asks.set()
    clients = [asyncio.create_task(load.client(number)) for number in range(AT_ONCE)]
    try:
        yield load
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def long_answer(address: str, number: int, begun: asyncio.Event) -> Timing:
    """An answer that takes longer than to ask for another number of workers."""
    call = Generate((2, 3 + number, *range(40, 90)), sampling=SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True))
    async with InferenceClient(address) as client:
        async for chunk in client.generate(call):
            begun.set()
            if chunk.finish:
                assert chunk.finish.usage.output_tokens == 900
                return chunk.finish.timing
    raise AssertionError("no end")


async def idle(address: str, under: Load) -> None:
    """Until nobody asks any more, and the router knows of every worker that it has nothing to do."""
    under.asks.clear()
    async with asyncio.timeout(60), httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as client:
        while under.asking:  # noqa: ASYNC110  it watches what has no event
            await asyncio.sleep(0.01)
        while True:
            families = text_string_to_metric_families((await client.get("/metrics")).text)
            if not any(sample.value for family in families for sample in family.samples if sample.name in BUSY):
                return


def retries(cluster: Cluster) -> list[str]:
    """What the router says of requests it took elsewhere: who leaves finishes what it has, so there should be none."""
    log = Path(str(cluster.state()["logs"]), "router.log").read_text()
    return [line for line in log.splitlines() if " after: " in line or " is lost" in line]


def diptych(*arguments: str) -> str:
    command = [sys.executable, "-m", "diptych.cluster.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pids(cluster: Cluster) -> dict[str, int]:
    known: Any = cluster.state()["processes"]
    return {process["name"]: process["pid"] for process in known}


async def flip_and_back(cluster: Cluster, under: Load) -> None:
    """From two and two workers to one and three, and back, in the same processes."""
    before = pids(cluster)
    said = await asyncio.to_thread(scaled, cluster, {Phase.PREFILL: (1,), Phase.DECODE: (3,)})
    assert said == ["prefill-1 finishes what it has, and becomes decode-2", "decode-2 has joined, in the processes of prefill-1"]
    assert await under.more(40) == {"prefill-0", "decode-0", "decode-1", "decode-2"}
    assert pids(cluster) == {**{name: pid for name, pid in before.items() if name != "prefill-1"}, "decode-2": before["prefill-1"]}
    said = await asyncio.to_thread(scaled, cluster, {Phase.PREFILL: (2,), Phase.DECODE: (2,)})
    assert said[-1] == "prefill-1 has joined, in the processes of decode-2"
    assert await under.more(40) == {f"{phase}-{number}" for phase in ("prefill", "decode") for number in range(2)}
    assert pids(cluster) == before


async def grow_and_shrink(cluster: Cluster) -> Load:
    async with load(str(cluster.state()["grpc"])) as under:
        assert await under.more(10) == {"prefill-0", "decode-0"}
        grown = await asyncio.to_thread(diptych, "scale", "--prefill", "2", "--decode", "2")
        assert grown.count("has joined") == 2
        assert await under.more(40) == {f"{phase}-{number}" for phase in ("prefill", "decode") for number in range(2)}
        assert "2 prefill workers, 2 decode workers" in await asyncio.to_thread(diptych, "status")
        await flip_and_back(cluster, under)
        await idle(str(cluster.state()["http"]), under)  # or what workers said a moment ago decides who is asked
        begun = [asyncio.Event() for _ in range(4)]
        answers = [asyncio.create_task(long_answer(under.address, number, event)) for number, event in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))
        under.asks.set()
        shrunk = await asyncio.to_thread(diptych, "scale", "--prefill", "1", "--decode", "1")
        assert shrunk.count("has left") == 2
        timings = await asyncio.gather(*answers)
        assert {timing.attempts for timing in timings} == {1}, retries(cluster)
        assert "decode-1" in {timing.decode_worker for timing in timings}, "who left had answers under way"
        assert await under.more(20) == {"prefill-0", "decode-0"}
    return under


@pytest.mark.timeout(240)
def test_no_request_is_lost_while_workers_join_and_leave(tiny_gemma3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    argv = ["-m", "diptych.cluster.cli", "up", "--model", str(tiny_gemma3_dir), *SMALL]
    with running(argv, {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "PYTHONSAFEPATH": "1"}) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        state = cluster.state()
        under = asyncio.run(grow_and_shrink(cluster))
        assert under.errors == []
        assert cluster.end() == 0
    assert nothing_left(state)
    assert "Starting it again" not in cluster.output


async def flip_with_a_kill(cluster: Cluster) -> Load:
    """The worker that is to change its role is stopped, so that it cannot be drained, and killed with the order unread."""
    async with load(str(cluster.state()["grpc"])) as under:
        await under.more(10)
        flipping = pids(cluster)["prefill-1"]
        os.kill(flipping, signal.SIGSTOP)
        changing = asyncio.create_task(asyncio.to_thread(scaled, cluster, {Phase.PREFILL: (1,), Phase.DECODE: (2,)}))
        log = Path(str(cluster.state()["logs"]), "supervisor.log")
        await asyncio.to_thread(wait_for, "it to be given up", lambda: "prefill-1 could not be drained" in log.read_text())
        os.kill(flipping, signal.SIGKILL)
        said = await changing
        assert said[-1].startswith("decode-1 has joined, started again: prefill-1 could not change its role in place.")
        assert pids(cluster)["decode-1"] != flipping
        assert await under.more(40) == {"prefill-0", "decode-0", "decode-1"}
    return under


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_worker_killed_while_it_changes_its_role_is_started_again_for_it(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    argv = ["-m", "diptych.cluster.cli", "up", "--model", str(tiny_gemma3_dir), *SMALL, "--prefill", "2"]
    with running(argv, {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "PYTHONSAFEPATH": "1"}) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        state = cluster.state()
        under = asyncio.run(flip_with_a_kill(cluster))
        assert under.errors == []
        assert cluster.end() == 0
    assert nothing_left(state)
