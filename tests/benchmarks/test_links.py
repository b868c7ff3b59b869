"""The two processes of the links benchmark: a whole pool is handed over, and the raw link moves what it says."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diptych.benchmarks import record
from diptych.benchmarks.links import __main__ as links
from diptych.benchmarks.links import ends
from diptych.benchmarks.links.__main__ import DEMO, chosen, join, main, raw_pass
from diptych.benchmarks.links.ends import rate, two_workers
from diptych.benchmarks.links.raw_gpu import RawGpuLink
from diptych.cluster.resources.devices import Gpu
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.transfer import Transport
from diptych.kv_transfer.device_memory import DeviceMemory
from diptych.kv_transfer.geometry import HEADER_BYTES, Geometry
from diptych.kv_transfer.pool import CPU, Pool
from fake_cuda import FakeGpu

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
    monkeypatch.setattr(links, "see_gpu", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["links", "--transport", "shm", "--transport", "cuda_ipc"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--transport: cuda_ipc cannot be measured here: that takes an NVIDIA GPU, and torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert chosen(None) == [Transport.SHM, Transport.GLOO]
    assert "no GPU: cuda_ipc and nccl not measured" in capsys.readouterr().out
    assert chosen(["gloo"]) == [Transport.GLOO]


def test_a_transport_that_fails_is_left_out_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept: list[list[str]] = []

    def measure(transport: Transport, options: object) -> dict[str, object]:
        if transport is Transport.NCCL:
            raise ConnectionError("NCCL says: Duplicate GPU detected")
        return {"block_us": 1.0, "pieces": {}}

    def keep(name: str, where: object, settings: object, results: dict[str, object]) -> Path:
        kept.append(list(results))
        return tmp_path / name

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(links, "see_gpu", lambda _: None)
    monkeypatch.setattr(links, "machines_alone", lambda *_: [1e-6] * 40)
    monkeypatch.setattr(links, "measure", measure)
    monkeypatch.setattr(links, "keep", keep)
    monkeypatch.setattr(sys, "argv", ["links"])
    main()
    said = capsys.readouterr()
    assert "\nnccl could not be measured\n" in said.out
    assert "NCCL says: Duplicate GPU detected" in said.err
    assert [names[2:] for names in kept] == [["cuda_ipc"], ["cuda_ipc", "shm"], ["cuda_ipc", "shm", "gloo"]]


@pytest.mark.parametrize(("keys", "other"), [([], None), (["3"], None), (["3", "5", "6"], "5")])
def test_the_other_process_has_another_gpu_if_there_is_one(keys: list[str], other: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "visible_gpus", lambda: [Gpu(key, "NVIDIA H100", 80 << 30) for key in keys])
    monkeypatch.setattr(ends.ends, "two_ends", lambda *asked: asked[-1])
    assert two_workers(SMALL, Transport.CUDA_IPC) == other


def test_the_raw_link_over_nccl_posts_all_and_waits_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a communicator that returns when it has asked the GPU; one that does not would be looked at after each piece."""
    gpu, asked, waits = FakeGpu(), list[tuple[int, int]](), list[int]()
    gpu.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(len(asked)))
    made = SimpleNamespace(send=lambda part, peer, stream: asked.append((len(part), peer)), abort=lambda: None)
    core = SimpleNamespace(
        get_unique_id=lambda: bytes(128),
        UniqueId=SimpleNamespace(from_bytes=lambda content: content),
        NCCLConfig=lambda **settings: settings,
        Communicator=SimpleNamespace(init=lambda *joined: joined == (2, 0, bytes(128), {"blocking": True}) and made),
    )
    monkeypatch.setitem(sys.modules, "nccl", SimpleNamespace(core=core))
    memory = DeviceMemory(Geometry(SMALL).size, SMALL.groups[0].layers, CPU)
    pool, size = Pool(SMALL, memory), Geometry(SMALL).size - HEADER_BYTES
    link = RawGpuLink(pool, SMALL, 0)
    link.join(str(tmp_path / "store"))
    assert link.send(64 << 10) > 0
    assert asked == [(64 << 10, 1)] * (size // (64 << 10))
    assert waits == [0, len(asked)]
    link.close()
    del link
    pool.close()


def test_the_demo_layout_is_the_demo_models() -> None:
    assert sum(len(group.layers) * group.token_bytes for group in DEMO.groups) * 16 == 288 << 10
    assert sorted(layer for group in DEMO.groups for layer in group.layers) == list(range(18))
