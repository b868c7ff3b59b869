"""The two processes of the links benchmark: a whole pool is handed over, and the raw link moves what it says."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from diptych.benchmarks import record
from diptych.benchmarks.links.__main__ import DEMO, chosen, join, main, raw_pass
from diptych.benchmarks.links.ends import rate, two_workers
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.transfer import Transport

SMALL = Layout("small", (CacheGroup(CacheKind.FULL, (0, 1, 2), kv_heads=2, head_dim=64, dtype=DType.BFLOAT16),), 16, (16,))


@pytest.mark.parametrize("transport", [pytest.param(each, marks=pytest.mark.gpu if each.on_gpu else ()) for each in Transport])
def test_a_pool_is_handed_over_and_moved(transport: Transport, tmp_path: Path) -> None:
    async def run() -> None:
        async with two_workers(SMALL, transport) as here:
            await join(here, transport, tmp_path / "store")
            assert await raw_pass(here, transport, 8 << 10) > 0
            assert await here.pass_over(64, 4) > 0
            assert await here.last_block() > 0

    asyncio.run(run())


def test_the_rate_is_that_of_the_median_pass() -> None:
    assert rate(SMALL, [1.0, 2e-6, 3e-6]) == pytest.approx(16 * 16 * 3 * 512 / 3e-6 / 1e9)


def test_a_transport_that_cannot_be_measured_here_is_refused_before_anything_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["links", "--transport", "shm", "--transport", "cuda_ipc"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--transport: cuda_ipc cannot be measured here: that takes an NVIDIA GPU, and torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert chosen(None) == [Transport.SHM, Transport.GLOO]
    assert "no GPU: cuda_ipc and nccl not measured" in capsys.readouterr().out
    assert chosen(["gloo"]) == [Transport.GLOO]


def test_the_demo_layout_is_the_demo_models() -> None:
    assert sum(len(group.layers) * group.token_bytes for group in DEMO.groups) * 16 == 288 << 10
    assert sorted(layer for group in DEMO.groups for layer in group.layers) == list(range(18))
