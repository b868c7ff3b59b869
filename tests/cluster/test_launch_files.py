"""The files for `ray up`: right for Ray's own reader, and every command in them exists, with its flags."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from diptych.cluster.cli import app
from diptych.cluster.on_ray.nodes import ROLES, ROUTER_ROLE, role
from diptych.cluster.supervising.config_file import read_config
from diptych.core.fleet import Phase
from doctor_harness import fake_program
from house_rules import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

with warnings.catch_warnings(action="ignore"):  # Ray's own code, to pydantic
    from ray.scripts.scripts import cli as ray_cli

LAUNCH = ROOT / "cluster" / "launch"
FILES = sorted(path for path in LAUNCH.glob("*.yaml") if path.name != "cluster.yaml")
CLOUDS = [path for path in FILES if path.name != "local.yaml"]
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands")  # fmt: skip
TOOLS = {"diptych": get_command(app), "ray": ray_cli}


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def commands(path: Path) -> list[str]:
    return [command for key in COMMANDS for command in read(path).get(key, ())]


def ours(command: str) -> list[list[str]]:
    """The calls of `diptych` and `ray` in a shell command."""
    calls: list[list[str]] = []
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    inside = False
    for word in lexer:
        if inside := (inside or word in TOOLS) and not set(word) <= set(";|&()"):
            if word in TOOLS:
                calls.append([])
            calls[-1].append(word)
    return calls


def test_there_is_a_file_for_each_place() -> None:
    assert [path.stem for path in FILES] == ["aws", "azure", "gcp", "local"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_reads_it(path: Path) -> None:
    prepared = prepare_config(read(path))
    validate_config(prepared)
    with pytest.raises(Exception, match="worker_start_commands"):
        validate_config({**prepared, "worker_start_commands": []})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_commands_are_shell_and_call_what_exists(path: Path) -> None:
    called = set()
    for command in commands(path):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=20)
        for tool, name, *arguments in ours(command):
            found = TOOLS[tool].commands[name]  # type: ignore[attr-defined]
            flags = {flag for parameter in found.params for flag in parameter.opts}
            assert {argument.partition("=")[0] for argument in arguments if argument.startswith("-")} <= flags, command
            called.add(f"{tool} {name}")
    assert called == {"diptych down", "diptych up", "ray stop", "ray start"}


def test_a_wrong_flag_would_be_found() -> None:
    (call,) = ours("ulimit -n 9; ray start --head --prot=6379; true")
    assert call == ["ray", "start", "--head", "--prot=6379"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_it_copies_is_in_the_repository(path: Path) -> None:
    mounts = read(path)["file_mounts"]
    made = {"~/diptych-dist": "dist", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert {there: mounts.pop(there) for there in made} == made, "by the commands of its first lines"
    assert [local for local in mounts.values() if not (ROOT / local).exists()] == []


def test_all_hosts_are_set_up_alike() -> None:
    first, *others = [read(path)["setup_commands"] for path in FILES]
    assert all(other == first for other in others)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_a_cloud_has_nodes_for_each_phase_with_and_without_gpus(path: Path) -> None:
    values = read(path)
    types = values["available_node_types"]
    roles = {name: ROLES.intersection(of["resources"]) for name, of in types.items()}
    assert roles == {
        "router": {ROUTER_ROLE},
        **{f"{phase}_{kind}": {role(phase)} for phase in Phase for kind in ("cpu", "gpu")},
    }
    assert values["head_node_type"] == "router"
    assert [types[f"{phase}_cpu"]["min_workers"] for phase in Phase] == [1, 1]


def test_nodes_with_gpus_have_what_torch_and_the_kernels_need() -> None:
    """CUDA 13, of PyPI's torch, takes driver 580; T4s are of compute capability 7.5. What the others bring their files do not tell."""
    gpus = {path.stem: [of["node_config"] for name, of in read(path)["available_node_types"].items() if "gpu" in name] for path in CLOUDS}
    families = [node["disks"][0]["initializeParams"]["sourceImage"] for node in gpus["gcp"]]
    assert [int(family.rpartition("-nvidia-")[2]) >= 580 for family in families] == [True] * 2
    assert not any("T4" in node["azure_arm_parameters"]["vmSize"] for node in gpus["azure"])
    assert not any(node["InstanceType"].startswith(("g4", "p3", "p2")) for node in gpus["aws"])


def test_the_config_that_the_head_serves_is_right() -> None:
    config = read_config(LAUNCH / "cluster.yaml", {})
    assert config.ray.joined
    assert config.ray.wait_s > 600, "nodes are still being made"


@pytest.mark.parametrize(
    ("address", "roles"),
    [
        ("prefill-only", {"diptych-prefill": 1}),
        ("decode-only", {"diptych-decode": 1}),
        ("10.0.0.3", {"diptych-prefill": 1, "diptych-decode": 1}),
    ],
)
def test_a_host_of_ones_own_gets_the_phase_that_the_file_says(tmp_path: Path, address: str, roles: dict[str, int]) -> None:
    (tmp_path / "ray").write_text('#!/bin/sh\nfor last; do :; done\necho "$last"\n')
    (tmp_path / "ray").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1", "RAY_CLOUD_INSTANCE_ID": address}
    started = subprocess.run(
        ["bash", "-c", read(LAUNCH / "local.yaml")["worker_start_ray_commands"][-1]],
        env=environment, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert json.loads(started.stdout.removeprefix("--resources=")) == roles


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("missing", [None, "c++", "gcc", "python3"])
def test_what_compiles_kernels_is_installed_where_it_is_missing(tmp_path: Path, path: Path, missing: str | None) -> None:
    """`python3`: it cannot say that it has venv and headers."""
    fake_program(tmp_path, "sudo", 'echo "$*"')
    for name in {"c++", "gcc", "python3"} - {missing}:
        fake_program(tmp_path, name, "")
    ran = subprocess.run(
        ["/bin/bash", "-c", read(path)["setup_commands"][0]],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert ("install -qy python3-venv python3-dev g++" in ran.stdout) == (missing is not None)


def test_it_is_asked_whether_python_has_its_headers(tmp_path: Path) -> None:
    asks = shlex.split(read(FILES[0])["setup_commands"][0])[3]
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    ran = subprocess.run([sys.executable, "-c", asks], capture_output=True, timeout=20, check=False)
    assert (ran.returncode == 0) == header.is_file()


def test_a_running_head_learns_of_new_addresses(tmp_path: Path) -> None:
    (tmp_path / "diptych").symlink_to(sys.prefix)
    (command,) = read(LAUNCH / "local.yaml")["head_setup_commands"]
    assert command.replace("~/diptych/bin/python", "python") in read(LAUNCH / "local.yaml")["head_start_ray_commands"]
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
    for addresses in (["10.0.0.2"], ["10.0.0.2", "10.0.0.3"]):
        provider = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": addresses}
        prepared = prepare_config({"cluster_name": "ours", "provider": provider, "auth": {"ssh_user": "ours"}})
        (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(prepared))
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=60)
        (known,) = tmp_path.rglob("cluster-ours.state")
        hosts = json.loads(known.read_text())
        assert sorted(hosts) == ["10.0.0.1", *addresses]
        assert [address for address, host in hosts.items() if host["state"] == "running"] == ["10.0.0.1"]
        again = json.loads((tmp_path / "ray_bootstrap_config.yaml").read_text())
        validate_config(prepare_config(again))
        assert [of["min_workers"] for of in again["available_node_types"].values()] == [len(hosts)]
