"""The Triton kernels compile for GPUs that are not here, fit in their shared memory and in registers; without triton torch computes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diptych.kernels import triton_kernels
from diptych.kernels.gpu import tiles

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compiled(capability: int, *options: str) -> list[dict[str, Any]]:
    """In a process of its own: this one's kernels are the interpreter's."""
    script = Path(__file__).parent / "triton_compiled.py"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(script), str(capability), *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment).stdout)


KERNELS = {
    "_attend_chunks",
    "_attend_split",
    "_best_chunk",
    "_count_equal",
    "_draw_chunk",
    "_found_edges",
    "_gated",
    "_join_splits",
    "_largest_key",
    "_last_equal",
    "_move_rows",
    "_residual_norm",
    "_rotary_store",
    "_tally_chunk",
}


FEW_BYTES = 512
"""Of a thread that may lie outside its registers where it is not looked at closely; fp32 tiles as large as those of bf16 spill 60,000."""


def check(found: list[dict[str, Any]], capability: int, spilled: int) -> None:
    assert {each["part"] for each in found} == KERNELS
    most = tiles.SHARED_BYTES[tiles.GENERATIONS.get(divmod(capability, 10), tiles.SMALL)]
    assert [each for each in found if each["spilled"] > spilled or each["shared"] > most] == []
    attention = [each for each in found if each["part"] in ("_attend_chunks", "_attend_split") and each["dtype"] == "torch.bfloat16"]
    assert [each for each in attention if not each["ahead"]] == [], "keys and values come while those before them are computed with"


@needs_triton
def test_in_bf16() -> None:
    check(compiled(90, "--few"), 90, 0)


@needs_triton
@pytest.mark.nightly
@pytest.mark.parametrize("capability", [86, 100, 120])
def test_for_other_gpus(capability: int) -> None:
    check(compiled(capability, "--few"), capability, 0)


@needs_triton
@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 90])
def test_in_every_shape_and_in_fp32(capability: int) -> None:
    """Three minutes each."""
    check(compiled(capability), capability, FEW_BYTES)


def test_without_triton_torch_computes_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "diptych.kernels.gpu.attend_chunks", None)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    triton_kernels.triton_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [triton_kernels.triton_for(torch.zeros(2)) for _ in range(2)] == [None, None]
    finally:
        triton_kernels.triton_kernels.cache_clear()
    (record,) = caplog.records
    assert "attend_chunks" in record.getMessage()
