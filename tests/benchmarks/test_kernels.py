"""The benchmark of the GPU's kernels, as far as it goes without one: every case runs, and without a GPU it says so and measures nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from diptych.benchmarks.kernels import HEADS, Sizes, main, measure
from triton_place import DEVICE, ON_GPU, on_triton

__all__ = ["on_triton"]


@pytest.mark.usefixtures("on_triton")
def test_every_case_runs() -> None:
    ran = []

    def clock(run) -> float:
        ran.append(run())
        return 2.0

    sizes = Sizes(batches=(2,), contexts=(48,), tokens=(1,), prefills=((0, 8), (16, 2)), moved=1 << 18, vocabulary=500)
    results = measure(sizes, torch.float32, DEVICE, clock)
    found = {(each["kernel"], each["shape"]): each for each in results["kernels"]}
    assert [name for name, _ in found] == [
        *("residual_norm", "gated", "rotary_store", "move_rows", "draw", "draw", "attend_singles", "attend_chunks", "attend_chunks")
    ]
    assert results["copy_gb_s"] == pytest.approx(2 * (1 << 20) / 2e-3 / 1e9)
    key_and_value = 2 * 8 * 128 * 4
    assert found["attend_singles", "2 x 48"]["bound_ms"] == pytest.approx(
        (2 * 48 * key_and_value + 4 * HEADS * 128 * 4) / results["copy_gb_s"] / 1e6
    )
    assert found["attend_chunks", "2 behind 16"]["torch_ms"] is None


@pytest.mark.skipif(ON_GPU, reason="there is one")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", "--keep", "kernels"])
    with pytest.raises(SystemExit, match="no GPU"):
        main()
