"""A real cluster of two pairs on two Ray nodes, from what `diptych plan` writes: KV moves within pairs, and deaths are survived."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from cluster_harness import Cluster, nothing_left, wait_for
from diptych.cluster.planner.latency import DecodeTimes, PrefillTimes, StepTimes
from diptych.cluster.planner.plan_file import config_of
from diptych.cluster.planner.policies import Policies
from diptych.cluster.planner.profile import DeviceShare, Link, Model, Parallelism, Profile
from diptych.cluster.planner.shapes import Plan, Shape
from diptych.cluster.process import processes
from diptych.core.fleet import LocalPrefill
from diptych.core.generate import Generate
from diptych.core.model import read_card
from diptych.core.sampling import SamplingParams
from diptych.rpc.inference import InferenceClient
from real_harness import diptych, ray_of_others, up
from test_real_ranks import listens

UP_S = 200.0
"""Four processes that import torch, on two cores that other tests use too."""
PAIRS = {("prefill-0", "decode-0"), ("prefill-1", "decode-1")}
TIMES = StepTimes(prefill=PrefillTimes(constant=0.01, token=1e-4, pair=0), decode=DecodeTimes(constant=0.02, context=0, row=0))


def plan(model: Path, file: Path, **ray: str) -> Path:
    """Two pairs, as `diptych plan --affinity low` writes them of a GPU, but on CPUs, and for what is said of `ray`."""
    card = read_card(model)
    sizes = {"layers": 4, "heads": 4, "kv_heads": 2, "max_context": card.max_context, "kv_token_bytes": 1e3, "weight_bytes": 1e3}
    profile = Profile(
        source="made up",
        model=Model(name=card.name, dtype=card.dtype.value, **sizes),
        device=DeviceShare(name="d", memory_bytes=1e9),
        parallelisms=(Parallelism(tp=1, times=TIMES, kv_tokens={1: 8192}),),
        links={"node": Link(bytes_per_s=1e9)},
    )
    values = config_of(Plan(Shape(1, 1), Shape(1, 1), 2, 2), profile, Policies(local_prefill=LocalPrefill.NEVER, paired=True), None)
    file.write_text(yaml.safe_dump({**values, "device": "cpu", "ray": {**values["ray"], **ray}}))
    return file


def went(cluster: Cluster, requests: int, tokens: int, seed: int, begun: threading.Event | None = None) -> list[tuple[str, str]]:
    """The workers of each of so many requests at once, all answered in full. `begun` is set when each has a token."""
    waiting = set(range(requests))

    async def one(client: InferenceClient, number: int) -> tuple[str, str]:
        prompt = (2, *(3 + (seed + 7 * number + 5 * at) % 500 for at in range(60)))
        count, workers = 0, ("", "")
        async for chunk in client.generate(Generate(prompt, sampling=SamplingParams(max_tokens=tokens, seed=7, ignore_eos=True))):
            count += len(chunk.tokens)
            waiting.discard(number)
            if begun and not waiting:
                begun.set()
            if chunk.finish:
                timing = chunk.finish.timing
                workers = (timing.prefill_worker, timing.decode_worker)
        assert count == tokens
        return workers

    async def ask() -> list[tuple[str, str]]:
        async with InferenceClient(str(cluster.state()["grpc"])) as client:
            return await asyncio.gather(*(one(client, number) for number in range(requests)))

    return asyncio.run(ask())


def pids(cluster: Cluster) -> dict[str, int]:
    found = {one["name"]: one["pid"] for one in cluster.state()["processes"]}  # type: ignore[attr-defined]
    return {name: pid for name, pid in found.items() if name.startswith(("prefill", "decode")) and pid is not None}


def nodes_of(cluster: Cluster) -> dict[str, str]:
    return {name: listens(pid).rpartition(":")[0] for name, pid in pids(cluster).items()}


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_two_pairs_on_two_nodes(tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = plan(tiny_gemma3_dir, runtime.parent / "plan.yaml")
    with (
        ray_of_others(scratch, monkeypatch, 2, 2) as address,
        up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address) as cluster,
    ):
        cluster.expect("Ctrl-C ends it.", UP_S)
        state, before = cluster.state(), pids(cluster)
        nodes = nodes_of(cluster)
        assert nodes["prefill-0"] == nodes["decode-0"] != nodes["prefill-1"] == nodes["decode-1"]
        assert "pairs: prefill-0 + decode-0, prefill-1 + decode-1" in diptych("status").stdout

        assert set(went(cluster, 16, 8, seed=0)) == PAIRS
        log = Path(str(state["logs"]), "router.log")
        assert "KV leaves its pair" not in log.read_text()

        begun = threading.Event()
        with ThreadPoolExecutor(1) as elsewhere:
            answered = elsewhere.submit(went, cluster, 8, 250, 1000, begun)
            assert begun.wait(60)
            for name in ("prefill-0", "decode-1"):
                processes.kill(before[name], str(state["id"]))
            assert len(answered.result(UP_S)) == 8, "all of them, whole"
        assert len(went(cluster, 4, 8, seed=2000)) == 4, "with what is left, or when they are back"
        wait_for("both again", lambda: all(cluster.output.count(f"{name} is ready") == 2 for name in ("prefill-0", "decode-1")), UP_S)
        wait_for("their pairs", lambda: set(went(cluster, 8, 4, seed=3000)) == PAIRS, UP_S)
        assert nodes_of(cluster) == nodes, "each to its partner's node"
        assert cluster.end() == 0
        assert nothing_left(state)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_pair_moves_together_from_a_node_that_died(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan(tiny_gemma3_dir, runtime.parent / "plan.yaml", placement="spread")
    with (
        ray_of_others(scratch, monkeypatch, 4, 2) as address,
        up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address) as cluster,
    ):
        cluster.expect("Ctrl-C ends it.", UP_S)
        nodes = nodes_of(cluster)
        assert nodes["prefill-0"] == nodes["decode-0"] != nodes["prefill-1"] == nodes["decode-1"] == "127.0.0.2"
        for pid in processes.marked(f"others-{scratch.name}"):
            if b"raylet/raylet" in (command := Path(f"/proc/{pid}/cmdline").read_bytes()) and b"127.0.0.2" in command:
                os.kill(pid, signal.SIGKILL)
        assert len(went(cluster, 8, 8, seed=0)) == 8, "they are answered meanwhile"
        wait_for("both again", lambda: all(cluster.output.count(f"{name} is ready") == 2 for name in ("prefill-1", "decode-1")), UP_S)
        assert set(nodes_of(cluster).values()) == {nodes["prefill-0"]}
        wait_for("its pair", lambda: set(went(cluster, 8, 4, seed=3000)) == PAIRS, UP_S)
        assert cluster.end() == 0
