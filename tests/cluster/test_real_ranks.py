"""Real workers of many ranks, through the command line: the same answers, whole or dead, and nothing left of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
import torch
from cluster_harness import Cluster, nothing_left, shared_memory, wait_for
from diptych.cluster.process import processes
from diptych.core.generate import Generate
from diptych.core.sampling import SamplingParams
from diptych.rpc.inference import InferenceClient
from real_harness import diptych, ray_of_others, up

UP_S = 200.0
"""Four processes that import torch, on two cores that other tests use too; alone they take 8 s."""
SPREAD = ("--prefill-tp", "2", "--decode-pp", "2")
RANKS = {("prefill-0", 0), ("prefill-0", 1), ("decode-0", 0), ("decode-0", 1)}


PROMPT = (2, *(3 + 7 * position % 500 for position in range(90)))


def answer(cluster: Cluster) -> tuple[int, ...]:
    """The tokens drawn behind `PROMPT`, which was handed over; always with the same seed."""
    call = Generate(PROMPT, sampling=SamplingParams(max_tokens=40, seed=7, ignore_eos=True))

    async def ask() -> tuple[int, ...]:
        tokens: list[int] = []
        async with InferenceClient(str(cluster.state()["grpc"])) as client:
            async for chunk in client.generate(call):
                tokens += [token.id for token in chunk.tokens]
                if chunk.finish:
                    timing = chunk.finish.timing
                    assert (timing.prefill_worker, timing.decode_worker) == ("prefill-0", "decode-0")
        return tuple(tokens)

    return asyncio.run(ask())


def pids(cluster: Cluster) -> dict[tuple[str, int], int]:
    """Of the workers' ranks."""
    found = {(one["name"], one["rank"]): one["pid"] for one in cluster.state()["processes"]}  # type: ignore[attr-defined]
    return {key: pid for key, pid in found.items() if key in RANKS and pid is not None}


def listens(pid: int) -> str:
    """The address of the node that a rank was started on."""
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return str(json.loads(arguments[arguments.index("--spec") + 1])["listen"])


def killed_and_back(cluster: Cluster, worker: str, rank: int) -> None:
    """Kill a rank; until its worker is there again, whole and with other processes."""
    before = pids(cluster)
    processes.kill(before[worker, rank], str(cluster.state()["id"]))
    wait_for("another life", lambda: cluster.output.count(f"{worker} is ready") == 2 and pids(cluster).keys() == RANKS, UP_S)
    for key, pid in before.items():
        assert (pids(cluster)[key] != pid) == (key[0] == worker), "the whole worker, and no other"
    assert [pid for key, pid in before.items() if key[0] == worker and processes.start_ticks(pid) is not None] == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config: prompts are handed over, or wait until they can be."""
    path = tmp_path / "cluster.yaml"
    path.write_text("router: {local_prefill: never}\nprefill: {threads: 1}\ndecode: {threads: 1}\n")
    return path


@pytest.fixture
def alone(tiny_gemma3_dir: Path, runtime: Path, file: Path) -> tuple[int, ...]:
    """What workers of one rank answer."""
    with up(tiny_gemma3_dir, runtime, "-f", str(file), "--no-ray") as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        said = answer(cluster)
        assert len(set(said)) > 10, "an answer that could be another"
        assert cluster.end() == 0
    return said


@pytest.mark.timeout(500)
def test_a_killed_rank_brings_its_worker_back_whole(tiny_gemma3_dir: Path, runtime: Path, file: Path) -> None:
    """That ranks answer as one does is shown for every parallelism in `tests/e2e/test_parallelism.py`, and here at night, on Ray."""
    before = shared_memory()
    with up(tiny_gemma3_dir, runtime, "-f", str(file), "--no-ray", *SPREAD) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        state, said = cluster.state(), answer(cluster)
        assert len(set(said)) > 10, "an answer that could be another"
        assert re.search(r"decode-0 +\d+ +127.0.0.1:\d+ +ready +1×2 ", diptych("status").stdout)
        assert re.search(r"prefill-0.rank1 +\d+\n", diptych("status").stdout)
        killed_and_back(cluster, "decode-0", 1)
        assert "decode-0.rank1 was ended by signal 9" in cluster.output
        assert answer(cluster) == said
        killed_and_back(cluster, "prefill-0", 0)
        assert answer(cluster) == said
        assert diptych("down").returncode == 0
        assert cluster.wait() == 0
    assert nothing_left(state)
    wait_for("the end of its names in shared memory", lambda: shared_memory() <= before)


@pytest.mark.nightly
@pytest.mark.timeout(500)
def test_on_ray_the_ranks_of_a_worker_have_a_placement_group_with_cores_each(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, file: Path, alone: tuple[int, ...]
) -> None:
    with (
        ray_of_others(scratch, monkeypatch, 4) as address,
        up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address, *SPREAD) as cluster,
    ):
        cluster.expect("Ctrl-C ends it.", UP_S)
        state = cluster.state()
        assert answer(cluster) == alone
        cores = [os.sched_getaffinity(pid) for pid in pids(cluster).values()]
        if len(os.sched_getaffinity(0)) >= 4:
            assert [len(own) for own in cores] == [1] * 4
            assert len(set().union(*cores)) == 4
        killed_and_back(cluster, "decode-0", 1)
        assert answer(cluster) == alone
        assert cluster.end() == 0
    assert nothing_left(state)


@pytest.mark.nightly
@pytest.mark.timeout(500)
def test_ranks_that_no_node_has_room_for_go_to_several(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, file: Path, alone: tuple[int, ...]
) -> None:
    """The first takes the node of two, the second what is left: a core on each of the others."""
    with (
        ray_of_others(scratch, monkeypatch, 2, 1, 1) as address,
        up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address, *SPREAD) as cluster,
    ):
        cluster.expect("Ctrl-C ends it.", UP_S)
        hosts = {key: listens(pid) for key, pid in pids(cluster).items()}
        assert hosts["prefill-0", 0] == hosts["prefill-0", 1]
        assert len(set(hosts.values())) == 3
        assert answer(cluster) == alone
        assert cluster.end() == 0


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_on_ray_a_rank_is_given_a_gpu_and_says_that_torch_cannot_use_it(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    """The GPUs are Ray's belief: a rank gets that far on a host without any."""
    if torch.cuda.is_available():
        pytest.skip("here torch can use it")
    with (
        ray_of_others(scratch, monkeypatch, 4, gpus=2) as address,
        up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address, "--device", "cuda") as cluster,
    ):
        assert cluster.wait(UP_S) == 2
        assert re.search(r"device: (prefill|decode)-0 is to compute on GPU [01], but torch is a CPU build", cluster.output)
