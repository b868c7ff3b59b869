"""Ranks of a worker as processes: how they come together, whom they refuse, and how they end together."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.process import child
from diptych.cluster.process.spec import RankSpec
from diptych.core.fleet import Phase
from e2e_harness import Rank, attached, rank_spec, request

START_S, ENDS_S = 150.0, 30.0
"""For a machine that does other things too."""
pytestmark = pytest.mark.timeout(300)  # processes that import torch first, on a machine that may be busy


@contextmanager
def started(*processes: Rank) -> Iterator[None]:
    try:
        yield
    finally:
        for rank in processes:
            rank.kill()


def refused(spec: RankSpec, *arguments: str) -> dict[str, Any]:
    """What a rank says that cannot start."""
    command = [sys.executable, "-m", "diptych.cluster.programs.rank", "--spec", spec.model_dump_json(), *arguments]
    run = subprocess.run(command, capture_output=True, timeout=START_S, cwd="/", check=False)
    assert run.returncode == child.FAILED, run.stderr.decode()
    assert b"Traceback" not in run.stderr
    event: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return event


def test_what_a_rank_cannot_be_is_named_before_anything_is_loaded(tiny_llama_dir: Path) -> None:
    def spec(**changes: object) -> RankSpec:
        return rank_spec(tiny_llama_dir, Phase.DECODE, "d0", **changes)

    assert refused(spec(tp=2, rank=1))["field"] == "leader"
    assert refused(spec(tp=2), "--leader", "127.0.0.1:1")["field"] == "leader"
    event = refused(spec(tp=2, rank=2), "--leader", "127.0.0.1:1")
    assert event["field"] == "rank"
    assert "d0 has 2 ranks" in event["message"]
    event = refused(spec(tp=3))
    assert event["field"] == "tp"
    assert "nearest that does is" in event["message"]
    assert refused(spec(stages=(1, 1)))["field"] == "pp"
    assert refused(spec(tp=2, listen="0.0.0.0:0"))["field"] == "advertise"
    assert "finds no leader at 127.0.0.1:1" in refused(spec(tp=2, rank=1), "--leader", "127.0.0.1:1")["message"]


def test_a_follower_that_is_another_is_refused_by_name_and_the_right_one_comes(
    tiny_llama_dir: Path, tiny_gemma3_dir: Path, tmp_path: Path
) -> None:
    spec = rank_spec(tiny_llama_dir, Phase.DECODE, "d0", tp=2)
    leader = Rank.start(spec, tmp_path)
    with started(leader):
        address = str(leader.wait_for("meeting", timeout_s=START_S)["address"])
        other = leader.start_follower(spec.model_copy(update={"rank": 1, "model_dir": tiny_gemma3_dir}), address)
        with started(other):
            event = other.wait_for("failed", "ready", timeout_s=START_S)
            assert event["field"] == "fingerprint"
            assert "at its leader" in str(event["message"])
            assert other.ended(ENDS_S) == child.FAILED
        leader.bring_followers(START_S)
        leader.wait_for("ready", timeout_s=START_S)
        assert leader.stop() == 0


def test_who_waits_for_others_ends_with_the_leader(tiny_llama_dir: Path, tmp_path: Path) -> None:
    spec = rank_spec(tiny_llama_dir, Phase.PREFILL, "p0", tp=2, stages=(2, 1))
    leader = Rank.start(spec, tmp_path)
    follower = leader.start_follower(spec.model_copy(update={"rank": 3}), str(leader.wait_for("meeting", timeout_s=START_S)["address"]))
    with started(leader, follower):
        follower.wait_for("progress", timeout_s=START_S)
        leader.process.kill()
        assert "leader" in str(follower.wait_for("failed", timeout_s=START_S)["message"])
        assert follower.ended(ENDS_S) == child.FAILED


@pytest.fixture
def workers(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[list[Rank]]:
    """Two workers of two ranks."""
    leaders = [Rank.start(rank_spec(tiny_llama_dir, Phase.DECODE, f"d{number}", tp=2), tmp_path) for number in range(2)]
    with started(*leaders):
        for leader in leaders:
            leader.bring_followers(START_S)
        for leader in leaders:
            leader.wait_for("ready", timeout_s=START_S)
        yield leaders


def test_a_rank_that_stands_still_ends_its_worker(workers: list[Rank]) -> None:
    """Nothing but its silence tells, and nothing need be asked of it."""
    for rank, still in enumerate((workers[0].members[1], workers[1].members[0])):
        still.process.send_signal(signal.SIGSTOP)
        other = workers[rank].members[rank]
        assert other.ended(ENDS_S) == child.DIED
        assert f"Lost rank {1 - rank} of this worker: it has said nothing for 6 s" in other.log.read_text()


def test_a_follower_leaves_ending_to_its_leader(workers: list[Rank]) -> None:
    leader, follower = workers[0].members

    async def main() -> None:
        async with attached(None, leader) as router:
            for number in (signal.SIGTERM, signal.SIGINT):
                follower.process.send_signal(number)
            answer = await router.local(request(range(3, 40)))
            assert answer.error is None
            assert len(answer.tokens) == 16

    asyncio.run(main())
    leader.process.send_signal(signal.SIGTERM)
    assert [rank.ended(ENDS_S) for rank in (leader, follower)] == [0, 0]
    assert "Traceback" not in leader.logs()
