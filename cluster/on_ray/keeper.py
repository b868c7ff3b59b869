"""The Ray actor that holds one process of the cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from ..process.child import seconds_alive
from ..resources.devices import VISIBLE

CHUNK_BYTES = 1 << 16


class Keeper:
    """The actor: holds one process. The process is on a leash (its stdin), so it ends when this actor does, however that comes."""

    def __init__(self, argv: list[str], log: str | None, environment: dict[str, str], options: list[str] | None) -> None:
        """`log`: a file on this host for the process's stderr; None: `log_lines` relays it. `options`: put behind `argv` on a node that may
        not be the supervisor's host, where the interpreter and the address are the node's own."""
        self._age = seconds_alive()
        if options is not None:
            address: Any = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            argv = [sys.executable, *argv[1:], "--host", str(address), *options]
        if ids := ray.get_gpu_ids():  # a node may tell Ray to set nothing (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES)
            environment = {**environment, VISIBLE: ",".join(map(str, ids))}
        if log is not None:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log or os.devnull, "ab") as stderr:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr if log else subprocess.PIPE,
                cwd="/",
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def pid(self) -> tuple[int, float]:
        """The process's id, and how old this actor's process was when it began."""
        return self._process.pid, self._age

    def lines(self) -> Iterator[str | int]:
        """What the process writes to stdout, line by line; last its exit status."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.decode(errors="replace")
        yield self._process.wait()

    def log_lines(self) -> Iterator[bytes]:
        """What it writes to stderr, as much at once as there is: a streamed item costs 0.6 ms."""
        if self._process.stderr is not None:
            while chunk := os.read(self._process.stderr.fileno(), CHUNK_BYTES):
                yield chunk

    def send(self, line: str) -> None:
        """To the process's stdin; one that has ended hears nothing."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)
