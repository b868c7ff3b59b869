"""Transfers beside the all-reduces of tensor parallelism on the same device: both go on, and both are right."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kv_rig import GLOO, ON_GPU, SHM, Way, faked
from test_contract import SPREADS, interleaved, layouts

PEER = Path(__file__).with_name("reducing_peer.py")


@contextmanager
def all_reduces(directory: Path, device: torch.device) -> Iterator[list[int]]:
    """Two ranks that add up meanwhile; at the end how often each did."""
    rounds: list[int] = []
    environment = os.environ | {"PYTHONSAFEPATH": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PEER), str(rank), str(directory / "store"), str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert json.loads(rank.stdout.readline())["reducing"]
        yield rounds
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0]
        rounds += [json.loads(line)["rounds"] for line in said]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


WAYS = [
    pytest.param(SHM, id=str(SHM)),
    pytest.param(GLOO, marks=pytest.mark.nightly, id=str(GLOO)),  # two more processes that import torch
    *ON_GPU,
]


@pytest.mark.timeout(300)  # two processes that import torch first, on a machine that may be busy
@pytest.mark.parametrize("way", WAYS)
def test_transfers_and_all_reduces_on_one_device(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = layouts(SPREADS["tp2 to tp1"])
    with faked(way, monkeypatch), all_reduces(tmp_path, way.device) as rounds:
        done, failed = asyncio.run(interleaved(way, 7, grpc=False, here=here, there=there, count=30))
    assert min(done, failed) > 2
    assert rounds[0] == rounds[1] > 10
