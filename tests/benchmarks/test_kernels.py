"""The benchmark of the GPU's kernels, as far as it goes without one: every case runs, what is compared computes the same, and without a GPU
it says so and measures nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diptych.benchmarks import attention_peers
from diptych.benchmarks.kernels import HEADS, Sizes, decode, main, measure, prefill
from diptych.benchmarks.pictures import PICTURES
from triton_place import DEVICE, ON_GPU, on_triton

__all__ = ["on_triton"]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_every_case_runs() -> None:
    ran = []

    def clock(run) -> float:
        ran.append(run())
        return 2.0

    sizes = Sizes(batches=(2,), contexts=(48,), tokens=(1,), prefills=((0, 8), (16, 2)), drawn=(1, 2), moved=1 << 18, vocabulary=500)
    results = measure(sizes, torch.float32, DEVICE, clock)
    found = {(each["kernel"], each["shape"]): each for each in results["kernels"]}
    assert [name for name, _ in found] == [
        *(
            "residual_norm",
            "gated",
            "rotary_store",
            *["move_rows"] * 4,
            "draw",
            "draw",
            *["edges"] * 6,
            "attend_singles",
            "attend_chunks",
            "attend_chunks",
        )
    ]
    assert results["copy_gb_s"] == pytest.approx(2 * (1 << 20) / 2e-3 / 1e9)
    key_and_value = 2 * 8 * 128 * 4
    assert found["attend_singles", "2 x 48"]["bound_ms"] == pytest.approx(
        (2 * 48 * key_and_value + 4 * HEADS * 128 * 4) / results["copy_gb_s"] / 1e6
    )
    assert found["attend_chunks", "2 behind 16"]["torch_ms"] is None
    moved = {shape: each["bound_ms"] for (name, shape), each in found.items() if name == "move_rows"}
    assert moved["half of 2' heads"] == moved["2 blocks, gathered"] / 2 == moved["2 blocks, scattered"] / 2
    assert moved["2 blocks, cast"] == moved["2 blocks, gathered"] * 3 / 4
    assert len(PICTURES["kernels"](results)) == 8


@pytest.mark.usefixtures("on_triton")
def test_torch_computes_the_same_attention() -> None:
    """What decode is compared with; `attend_singles` itself has its tests with the kernels."""
    case = decode(2, 48, torch.float32, DEVICE)
    assert case.twin is not None
    torch.testing.assert_close(case.run(), case.twin(), rtol=1e-4, atol=1e-4)


class PagedAttention:
    """What FlashInfer's manual says of both its wrappers, slowly; one sequence's queries after the other's."""

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert layout == "HND"

    def run(self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        outs = []
        for row, (begin, end) in enumerate(zip(self.begins, self.begins[1:], strict=False)):
            keys, values = (each[self.blocks[begin:end]].transpose(1, 2).flatten(0, 1) for each in pages)
            assert self.last[row] == pages[0].shape[2]
            queries = query[self.tokens[row] : self.tokens[row + 1]].transpose(0, 1)
            behind = len(keys) - queries.shape[1]
            mask = torch.ones(queries.shape[1], len(keys), dtype=torch.bool, device=query.device).tril(behind)
            outs.append(F.scaled_dot_product_attention(queries, *(each.transpose(0, 1) for each in (keys, values)), mask, enable_gqa=True))
        return torch.cat(outs, 1).transpose(0, 1).flatten(1)


class Decode(PagedAttention):
    def plan(self, begins: torch.Tensor, blocks: torch.Tensor, last: torch.Tensor, *heads: int, **types: torch.dtype) -> None:
        assert heads == (HEADS, 8, 128, 16)
        self.begins, self.blocks, self.last, self.tokens = begins.tolist(), blocks.long(), last, list(range(len(begins)))


class Prefill(PagedAttention):
    def plan(
        self, tokens: torch.Tensor, begins: torch.Tensor, blocks: torch.Tensor, last: torch.Tensor, *heads: int, causal: bool, **types: Any
    ) -> None:
        assert (heads, causal) == ((HEADS, 8, 128, 16), True)
        self.begins, self.blocks, self.last, self.tokens = begins.tolist(), blocks.long(), last, tokens.tolist()


@pytest.mark.usefixtures("on_triton")
def test_flashinfer_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an impostor with its interface: FlashInfer itself needs a GPU."""
    wrappers = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Decode, BatchPrefillWithPagedKVCacheWrapper=Prefill)
    monkeypatch.setitem(sys.modules, "flashinfer", wrappers)
    monkeypatch.setattr(attention_peers, "HAS_FLASHINFER", True)
    for case in (decode(2, 32, torch.float32, DEVICE), prefill(16, 16, torch.float32, DEVICE)):
        assert case.flashinfer is not None
        torch.testing.assert_close(case.run(), case.flashinfer(), rtol=1e-4, atol=1e-4)


def test_what_does_not_take_a_shape_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def refuses() -> None:
        raise ValueError("head_dim 7 is odd\nat line 3")

    assert attention_peers.timed("FlashInfer", refuses, lambda run: run() or 1.0) is None
    assert capsys.readouterr().err == "FlashInfer does not take this: head_dim 7 is odd\n"


@pytest.mark.skipif(ON_GPU, reason="there is one")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", "--keep", "kernels"])
    with pytest.raises(SystemExit, match="no GPU"):
        main()
