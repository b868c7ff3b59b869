"""The Ray actor that holds a process: what that process is started with."""

from __future__ import annotations

import sys

import pytest
from diptych.cluster.on_ray import keeper
from diptych.cluster.on_ray.keeper import Keeper


@pytest.mark.parametrize(("given", "seen"), [([], "those of the node"), ([3], "3"), (["GPU-abc"], "GPU-abc")])
def test_a_process_sees_the_gpu_that_ray_gave_its_actor(given: list[int | str], seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a node that has told Ray to set nothing itself."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "those of the node")
    monkeypatch.setattr(keeper, "seconds_alive", lambda: 0.0)
    monkeypatch.setattr(keeper.ray, "get_gpu_ids", lambda: given)
    held = Keeper([sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"], None, {"OTHER": "1"}, None)
    assert list(held.lines()) == [f"{seen}\n", 0]
