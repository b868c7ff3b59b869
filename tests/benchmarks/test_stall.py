"""What is compared by the stall benchmark on one GPU, as far as it goes without one."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch
from diptych.benchmarks import stall
from diptych.core.config import load_config


def test_on_a_gpu_both_share_what_the_one_has() -> None:
    found = stall.clusters(Namespace(device="cuda", model="m", dtype="bfloat16"))
    apart, together = (load_config(found[name]) for name in ("apart", "colocated"))
    assert (apart.prefill.workers, apart.decode.workers) == (1, 1)
    assert (together.prefill.workers, together.decode.workers) == (0, 1)
    assert apart.prefill.memory_fraction == apart.decode.memory_fraction == stall.GPU_SHARE
    assert together.decode.memory_fraction == 2 * stall.GPU_SHARE
    assert apart.device == together.device == "cuda"


def test_on_a_cpu_nothing_is_said_of_memory() -> None:
    found = stall.clusters(Namespace(device="cpu", model=None, dtype="bfloat16"))
    assert all("memory_fraction" not in config[phase] for config in found.values() for phase in ("prefill", "decode"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stall", "--device", "cuda"])
    with pytest.raises(SystemExit, match="no GPU: not measured"):
        stall.main()
