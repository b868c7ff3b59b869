"""Real clusters through the command line, and a Ray cluster of somebody else's for them to join."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import running
from diptych.cluster.on_ray.launcher import ray_environment
from diptych.cluster.process import processes

ROOT = Path(__file__).resolve().parents[2]
UP_S = 90.0
"""For a cluster to be up, on two cores that other tests use too; alone it takes 5 s plain and 10 s with Ray."""


def up(model: Path, runtime: Path, *flags: str) -> Any:
    ports = ("--http-port", "0", "--grpc-port", "0")
    argv = ["-m", "diptych.cluster.cli", "up", "--model", str(model), *ports, *flags]
    return running(argv, {"XDG_RUNTIME_DIR": str(runtime), "PYTHONSAFEPATH": "1"}, cwd=ROOT)


def diptych(*arguments: str, stdin: str | None = None, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diptych.cluster.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)


PROMPT = "the thin man and the other thing in the inn; then another one, and the end of it all there"


@contextmanager
def ray_of_others(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *cpus: int, gpus: int = 0, kinds: Sequence[str] = (), asks: str = "token"
) -> Iterator[str]:
    """A Ray cluster of nodes with so many CPUs, and GPUs that Ray believes in, at 127.0.0.1, .2 and so on, that somebody else has started;
    its address. `kinds`: of device, by node. `asks`: for what, as RAY_AUTH_MODE says it."""
    mark = f"others-{directory.name}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in (ray_environment({}, local=True) | {"RAY_AUTH_MODE": asks}).items():
        monkeypatch.setenv(name, value)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--object-store-memory=83886080"]
    head = ["--head", f"--port={port}", f"--temp-dir={directory}", "--include-dashboard=false"]
    try:
        for number, count in enumerate(cpus, start=1):
            where = [f"--node-ip-address=127.0.0.{number}", f"--num-cpus={count}", f"--num-gpus={gpus}"]
            if kinds:
                where.append(f"--resources={json.dumps({f'accelerator_type:{kinds[number - 1]}': 1})}")
            role = [f"--address=127.0.0.1:{port}"] if number > 1 else head
            whole, environment = [*command, *where, *role], {**os.environ, processes.MARK: mark}
            started = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=90, check=False)
            assert started.returncode == 0, started.stdout + started.stderr
        yield f"127.0.0.1:{port}"
    finally:
        processes.sweep(mark, ())
