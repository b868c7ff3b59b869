"""A transport that cannot work here is refused by name before anything is started, or by the rank that is told to use it."""

from __future__ import annotations

import logging

import pytest
import torch
from diptych.cluster.resources.preflight import check_kv_dtype, check_transports
from diptych.core.config import ClusterConfig
from diptych.core.errors import ConfigError
from diptych.core.transfer import Transport
from diptych.kv_transfer.transports import wiring

GPU = torch.device("cuda", 0)


def config(*transports: str) -> ClusterConfig:
    return ClusterConfig.model_validate({"transfer": {"transports": list(transports)}})


@pytest.mark.parametrize("name", ["nccl", "cuda_ipc"])
def test_without_a_gpu(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"transfer.transports names {name}, which moves KV that is on a GPU; here KV is in host"
    ) as caught:
        check_transports(config("shm", name), on_gpu=False)
    assert caught.value.field == "transfer.transports"


def test_what_moves_host_memory_alone_on_a_gpu() -> None:
    with pytest.raises(ConfigError, match="names gloo, which moves KV that is in host memory; here KV is on a GPU, for cuda_ipc and nccl"):
        check_transports(config("nccl", "gloo"), on_gpu=True)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_nobody_who_named_none_is_refused(on_gpu: bool) -> None:
    check_transports(ClusterConfig(), on_gpu=on_gpu)


def test_without_nccl4py(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(wiring, "installed", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert wiring.usable((), GPU) == (Transport.CUDA_IPC,)
    assert "nccl4py is not installed" in caplog.text
    with pytest.raises(ConfigError, match="names nccl alone, and nccl4py is not installed") as caught:
        wiring.usable((Transport.NCCL,), GPU)
    assert caught.value.field == "transfer.transports"
    assert wiring.usable((), torch.device("cpu")) == (Transport.SHM, Transport.GLOO)


def test_with_nccl4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "installed", lambda: True)
    assert wiring.usable((), GPU) == (Transport.CUDA_IPC, Transport.NCCL)


def test_gpus_do_not_hold_int8() -> None:
    config = ClusterConfig.model_validate({"model": {"kv_dtype": "int8"}})
    check_kv_dtype(config, on_gpu=False)
    check_kv_dtype(ClusterConfig(), on_gpu=True)
    with pytest.raises(ConfigError, match=r"model.kv_dtype: int8 is for workers on a CPU.* say device: cpu"):
        check_kv_dtype(config, on_gpu=True)
