"""What a newcomer installs and what the gate pins; stubs fresh; commands that must start light."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from house_rules import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)$")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    matches = [PIN.match(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {canonical(match[1]): match[2] for match in matches if match}


def test_every_dependency_is_pinned_and_ranged() -> None:
    wanted = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    assert [line for line in wanted if canonical(line) not in pins()] == []
    assert [line for line in wanted if not re.search(r"(>=.*,<|==)", line)] == []


def test_the_extras_are_there() -> None:
    assert set(PROJECT["optional-dependencies"]) == {"demo", "test", "gpu"}
    gpu = {canonical(line) for line in PROJECT["optional-dependencies"]["gpu"]}
    assert {"triton", "nccl4py"} <= gpu
    assert not [name for name in gpu if name.startswith("nvidia-nccl")], "torch for CUDA brings one, and another would overwrite its file"


def test_every_install_command_uses_the_pins() -> None:
    files = [ROOT / "Makefile", ROOT / ".ci/run", *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    commands = [(file.name, line) for file in files for line in file.read_text().splitlines() if "pip install" in line]
    assert [command for command in commands if "-c constraints.txt" not in command[1]] == []


def test_stubs_are_what_the_proto_files_say() -> None:
    subprocess.run([sys.executable, ROOT / "proto/generate.py", "--check"], check=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["chat", "--help"], ["status", "--help"]])
@pytest.mark.skipif(not (ROOT / "cluster/cli.py").exists(), reason="no command line yet")
def test_a_light_command_loads_neither_torch_nor_ray(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom diptych.cluster.cli import main\nsys.argv = ['diptych', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script, *arguments], capture_output=True, timeout=60, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_gate_finds_a_process_left_behind() -> None:
    """A daemon that left its session and its parent is still found, killed and reported."""
    orphan = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n"
    for script, status in ((orphan, 1), ("", 0)):
        result = subprocess.run(
            [sys.executable, ROOT / ".ci/leaves_nothing.py", sys.executable, "-c", script],
            capture_output=True,
            timeout=60,
            text=True,
            check=False,
        )
        assert result.returncode == status
        assert ("left behind:" in result.stderr) == bool(status)


def test_the_gate_keeps_the_command_s_own_status() -> None:
    command = [sys.executable, ROOT / ".ci/leaves_nothing.py", sys.executable, "-c", "raise SystemExit(3)"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 3


def test_a_gate_that_is_ended_ends_what_it_started() -> None:
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '300'], start_new_session=True); print(p.pid, flush=True); p.wait()"
    command = [sys.executable, ROOT / ".ci/leaves_nothing.py", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gate:
        assert gate.stdout is not None
        sleeper = int(gate.stdout.readline())
        gate.terminate()
        assert gate.wait(30) == 128 + signal.SIGTERM
    with suppress(FileNotFoundError, ProcessLookupError):
        stat = Path(f"/proc/{sleeper}/stat").read_text()
        assert stat.rpartition(")")[2].split()[0] == "Z", "dead, and nobody has asked yet"
