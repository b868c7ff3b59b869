"""What `up` and `diptych doctor` think of a host with GPUs, which are NVIDIA's driver's word here."""

from __future__ import annotations

import dataclasses
import socket
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.doctor import examining, gpus, host, probing
from diptych.cluster.doctor.finding import Finding, State, ok
from diptych.cluster.doctor.host import HostFacts
from diptych.cluster.resources.devices import Gpu
from diptych.core.errors import ConfigError
from doctor_harness import config, examined, fake_program

L4 = Gpu("0", "NVIDIA L4", 24 << 30, (13, 0), (8, 9))


GOOD = HostFacts(cores=4, packages={}, compiler="/usr/bin/c++", shm_free=1 << 30, disk_free=100 << 30, open_files=1 << 16)


def but(**changes: Any) -> HostFacts:
    return dataclasses.replace(GOOD, **changes)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def host_has(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    """A host with these GPUs, and all that they need: a torch for CUDA 13.0, and what compiles kernels."""
    monkeypatch.setattr(examining, "visible_gpus", lambda: list(gpus))
    monkeypatch.setattr(examining, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(probing, "installed", lambda name: "2.30")
    monkeypatch.setattr(probing, "_has_headers", lambda: True)


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (Gpu("0", "NVIDIA L4", 24 << 30, (12, 8), (8, 9)), "driver here runs CUDA up to 12.8, and torch is built for 13.0"),
        (Gpu("0", "Tesla T4", 16 << 30, (13, 0), (7, 5)), "Tesla T4, 7.5"),
    ],
)
def test_gpus_that_auto_passes_over_are_named(gpu: Gpu, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host_has(monkeypatch, gpu)
    finding = examined(config(tmp_path))["device"]
    assert finding.state is State.NOTE
    assert says in finding.said
    assert any(says in said for said in examining.before_up(config(tmp_path)))
    assert "device" not in examined(config(tmp_path, device="cpu"))


@pytest.mark.parametrize("script", [None, "exit 9"])
def test_up_counts_gpus_without_nvidia_smi(script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host_has(monkeypatch, L4)
    for name in ("gcc", "g++"):
        fake_program(tmp_path, name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(gpus.judge_gpus(None, None, usable=1)).state is State.NOTE
    if script is not None:
        fake_program(tmp_path, "nvidia-smi", script)
    assert examining.before_up(config(tmp_path, device="cuda")) == [
        said for said in examining.before_up(config(tmp_path)) if "compiler" in said
    ]
    assert examined(config(tmp_path, device="cuda"))["transports"].state is State.OK


def test_what_compiles_kernels_for_gpus_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is a note, and about C++."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    host_has(monkeypatch, L4)
    monkeypatch.setattr(probing, "_has_headers", lambda: False)
    assert "C compiler" in examined(config(tmp_path))["kernels"].mend
    with pytest.raises(ConfigError, match=r"missing: a C compiler .* and Python\.h"):
        examining.before_up(config(tmp_path))
    fake_program(tmp_path, "clang", "")
    with pytest.raises(ConfigError, match=r"missing: Python\.h"):
        examining.before_up(config(tmp_path))
    monkeypatch.setattr(probing, "_has_headers", lambda: True)
    assert examined(config(tmp_path))["kernels"] == ok("kernels", f"compiled by {tmp_path}/clang")
    assert "kernels" not in examined(config(tmp_path, device="cpu"))


def test_a_compiler_that_is_named_is_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, "gcc", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "not-there")
    assert probing._c_compiler() is None
    monkeypatch.delenv("CC")
    assert probing._c_compiler() == str(tmp_path / "gcc")


@pytest.mark.parametrize(("scheme", "asked"), [("posix_local", "posix_prefix"), ("venv", "venv")])
def test_headers_are_looked_for_where_triton_does(scheme: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: scheme)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, of: str(tmp_path / f"{name}-{of}"))
    assert not probing._has_headers()
    (tmp_path / f"include-{asked}").mkdir()
    (tmp_path / f"include-{asked}" / "Python.h").touch()
    assert probing._has_headers()


def test_transports_of_gpus_need_one() -> None:
    assert set(host.obstacles(GOOD)) == {"nccl", "cuda_ipc"}
    assert set(host.obstacles(but(gpus=2, extras={"nccl4py": None}))) == {"nccl"}
    assert host.obstacles(but(gpus=2, extras={"nccl4py": "0.3"})) == {}


# GPUs, by what nvidia-smi says.

H100 = "0, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4, Default, 0"
HEAD = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0 |"


def judged(*lines: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in gpus.judge_gpus("\n".join(lines), None)}


def test_good_gpus() -> None:
    found = judged(H100, H100.replace("0, NVIDIA", "1, NVIDIA").replace("Default, 0", "[N/A], [N/A]"))
    assert [finding.state for finding in found.values()] == [State.OK]
    assert "0: NVIDIA H100 80GB HBM3, 81559 MiB, 1: " in found["GPUs"].said
    assert only(gpus.judge_gpus(None, None)).said.startswith("none")


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        (H100.replace("Default", "Exclusive_Process"), State.WRONG, "a second process cannot use it"),
        (H100.replace("Default, 0", "Default, 3"), State.WRONG, "3 uncorrected memory errors"),
        (H100.replace("81559, 4", "81559, 60000"), State.NOTE, "taken by others"),
    ],
)
def test_a_gpu_that_is_wrong(line: str, kind: State, says: str) -> None:
    finding = judged(line)["GPU 0"]
    assert finding.state is kind
    assert says in finding.said
    assert finding.mend


def test_a_slice_whose_memory_nvidia_smi_may_not_see() -> None:
    hidden = "[Insufficient Permissions]"
    found = judged(f"0, NVIDIA H100 80GB HBM3, 580.65.06, {hidden}, {hidden}, Default, {hidden}")
    assert {check: (finding.state, finding.said) for check, finding in found.items()} == {"GPUs": (State.OK, "0: NVIDIA H100 80GB HBM3")}


def test_drivers_and_versions() -> None:
    assert [finding.state for finding in gpus.judge_gpus(f"{H100}\n{H100.replace('580.65.06', '550.1')}", None)][-1] is State.WRONG
    assert only(gpus.judge_gpus(None, "Driver/library version mismatch")).state is State.WRONG
    assert only(gpus.judge_gpus("0, what is this", None)).state is State.WRONG
    assert only(gpus.judge_driver(HEAD, "13.0")).state is State.OK
    assert only(gpus.judge_driver(HEAD, "12.8")).state is State.OK
    assert only(gpus.judge_driver(HEAD.replace("13.0", "12.4"), "13.0")).state is State.WRONG
    assert only(gpus.judge_driver(HEAD, None)).state is State.WRONG
    newer = "| NVIDIA-SMI 610.43.02    KMD Version: 610.43.02    CUDA UMD Version: 13.3 |"
    assert only(gpus.judge_driver(newer, "14.0")).said == "The driver runs CUDA up to 13.3; torch wants 14.0."
    assert list(gpus.judge_driver(None, None)) == []
    assert only(gpus.judge_nccl(None, wanted=True)).state is State.WRONG
    assert only(gpus.judge_nccl("2.18.3", wanted=True)).state is State.WRONG
    assert only(gpus.judge_nccl("2.28.9", wanted=True)).state is State.OK
    assert list(gpus.judge_nccl(None, wanted=False)) == []


@pytest.mark.parametrize("brought", ["nvidia-nccl-cu12", "nvidia-nccl-cu13"])
def test_torch_brings_nccl_for_its_cuda(brought: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "installed", {brought: "2.29.7"}.get)
    assert probing.look(ray=False, gpus=1).nccl == "2.29.7"


@pytest.mark.parametrize(("number", "version"), [(22809, "2.28.9"), (23007, "2.30.7"), (2804, "2.8.4")])
def test_nccl_that_others_torch_is_linked_with(number: int, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def ncclGetVersion(self, found: Any) -> int:
            found._obj.value = number
            return 0

    monkeypatch.setattr(probing, "installed", lambda name: None)
    monkeypatch.setattr(probing.ctypes, "CDLL", {"libnccl.so.2": Library()}.__getitem__)
    assert probing._nccl() == version


def test_there_is_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(probing, "installed", lambda name: None)
    monkeypatch.setattr(probing.ctypes, "CDLL", missing)
    assert probing._nccl() is None


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({}, True),
        ({"transfer": {"transports": ["cuda_ipc"]}}, False),
        ({"transfer": {"transports": ["cuda_ipc"]}, "decode": {"tp": 2}}, True),
        ({"transfer": {"transports": ["cuda_ipc"]}, "decode": {"groups": [{"stages": [1, 1]}]}}, True),
        ({"prefill": {"workers": 0}, "router": {"local_prefill": "always"}}, False),
        ({"device": "cpu", "decode": {"tp": 2}}, False),
    ],
)
def test_nccl_is_asked_for_where_something_goes_over_it(
    sections: dict[str, Any], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_has(monkeypatch, L4)
    monkeypatch.setattr(probing, "_c_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(probing, "_nccl", lambda: None)
    asked = config(tmp_path, **{"router": {}, **sections})
    assert (examined(asked).get("NCCL") is not None) == wanted
    if not wanted:
        examining.before_up(asked)
        return
    with pytest.raises(ConfigError, match="It is not found, and what GPUs tell each other goes over it"):
        examining.before_up(asked)


def test_the_head_of_a_cluster_whose_nodes_have_gpus_needs_none(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        joined = {"address": f"127.0.0.1:{head.getsockname()[1]}"}
        found = examined(config(tmp_path, device="cuda", ray=joined, security={"allow_unauthenticated": True}))
    assert [finding for finding in found.values() if finding.state is State.WRONG] == []
    assert "suffices" in found["memory"].said


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probing.ask_smi() == probing.Smi()
    fake_program(tmp_path, "nvidia-smi", f'case "$1" in --query*) echo "{H100}";; *) echo "{HEAD}";; esac')
    asked = probing.ask_smi()
    assert (asked.query, asked.head, asked.failure) == (f"{H100}\n", f"{HEAD}\n", None)
    fake_program(tmp_path, "nvidia-smi", 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    assert probing.ask_smi().failure == "Failed to initialize NVML: Driver/library version mismatch"


def test_gpus_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their own program says it, on a host that has none otherwise."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(examining, "torch_cuda", lambda: "13.0")
    exclusive, old = H100.replace("Default", "Exclusive_Process"), HEAD.replace("13.0", "12.4")
    fake_program(tmp_path, "nvidia-smi", f'case "$1" in --query*) echo "{exclusive}";; *) echo "{old}";; esac')
    found = examined(config(tmp_path, device="cpu"))
    assert (found["GPU 0"].state, found["driver"].state) == (State.WRONG, State.WRONG)
    fake_program(tmp_path, "nvidia-smi", 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    assert "version mismatch" in examined(config(tmp_path, device="cpu"))["GPUs"].said
