"""Which workers capture their decode steps, and what is said where they do not. Capturing itself needs a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cluster_harness import write_card
from diptych.cluster.process.spec import BLOCK_SIZE, RankSpec
from diptych.cluster.programs import graphs
from diptych.cluster.programs.serving import capacity_tokens
from diptych.core.fleet import Phase
from diptych.core.layout import Layout
from diptych.core.model import ModelCard, read_card
from diptych.engine.decode_shapes import DecodeShape

GPU = torch.device("cuda", 0)


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return read_card(write_card(tmp_path / "model", weights_bytes=1 << 30))


@pytest.fixture
def layout(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Of a worker whose attention is Triton's."""
    monkeypatch.setattr(graphs, "attends", lambda *_: True)
    return card.layout(block_size=BLOCK_SIZE, kv_tokens=BLOCK_SIZE)


def rank(**changes: object) -> RankSpec:
    values = {"worker_id": "d", "phase": Phase.DECODE, "model_dir": "/", "device": "cuda", "max_running": 8, **changes}
    return RankSpec.model_validate(values)


def test_a_decode_worker_on_a_gpu_captures(card: ModelCard, layout: Layout) -> None:
    shapes = graphs.shapes_of(rank(), card, layout, GPU)
    assert {shape.rows for shape in shapes} == {1, 2, 4, 8}
    assert shapes[0].context == card.max_context


def test_what_does_not_decode_on_a_gpu_has_nothing_to_capture(card: ModelCard, layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    assert graphs.shapes_of(rank(phase=Phase.PREFILL), card, layout, GPU) == ()
    assert graphs.shapes_of(rank(device="cpu"), card, layout, torch.device("cpu")) == ()
    assert not caplog.records, "and nothing to say"


def test_where_steps_cannot_be_captured_the_log_says_why(card: ModelCard, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs.hindrance(rank(), card, layout, GPU) is None
    assert graphs.hindrance(rank(cuda_graphs=False), card, layout, GPU) == "cuda_graphs is false"
    assert graphs.hindrance(rank(), card, replace(layout, tp=2), GPU) == "the worker has 2 ranks"
    monkeypatch.setattr(graphs, "attends", lambda *_: False)
    assert graphs.hindrance(rank(), card, layout, GPU) == "attention is not computed by Triton's kernels"


def test_a_capture_that_fails_leaves_a_worker_that_launches_its_kernels(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    class Engine:
        def capture(self, *_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "CudaCapture", lambda device: device)
    monkeypatch.setattr(graphs, "untold_bytes", lambda _: 0)
    with caplog.at_level(logging.WARNING):
        assert graphs.rehearse(Engine(), (DecodeShape(8, 64), DecodeShape(4, 64)), GPU) == ((), 0)
    (said,) = caplog.messages
    assert said.startswith("Decode steps run without CUDA graphs")
    assert "operation not permitted when stream is capturing" in said


@pytest.mark.parametrize(
    ("taken", "each"),
    [
        ((100, 900, 930, 980, 1010), 30),  # the first pays for what comes but once
        ((100, 900, 930 + (1 << 30), 980 + (1 << 31), 1010 + (1 << 31)), 30),  # another process takes memory of the GPU
        ((100, 900, 930, 920, 950), 0),  # or gives some back
        ((100, 900, 1 << 30, 2 << 30, 3 << 30), graphs.MOST_GRAPH_BYTES),
    ],
)
def test_graphs_are_budgeted_by_what_a_later_one_takes(taken: tuple[int, ...], each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told, captured = iter(taken), []

    class Engine:
        def capture(self, shapes: tuple[DecodeShape, ...], _: object, done: Callable[[int], None]) -> None:
            captured.append(shapes)
            for count in range(len(shapes)):
                done(1 + count)

    monkeypatch.setattr(graphs, "CudaCapture", lambda device: device)
    monkeypatch.setattr(graphs, "untold_bytes", lambda _: next(told))
    shapes = tuple(DecodeShape(rows, 64) for rows in (16, 8, 4, 2, 1))
    assert graphs.rehearse(Engine(), shapes, GPU) == (shapes, 5 * each)
    assert captured == [shapes[:4]]
    assert graphs.rehearse(Engine(), (), GPU) == ((), 0)


def test_a_single_graph_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", lambda *_: True)
    monkeypatch.setattr(graphs, "untold_bytes", lambda _: 100)
    assert graphs.rehearse(None, (DecodeShape(1, 64),), GPU) == ((DecodeShape(1, 64),), graphs.MOST_GRAPH_BYTES)


def test_the_longest_sequence_is_without_the_engines_own_block(card: ModelCard) -> None:
    assert capacity_tokens((3, 5), card) == 3 * BLOCK_SIZE
