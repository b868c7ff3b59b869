"""The Ray actor that holds one process of the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from .child import seconds_alive


class Keeper:
    """The actor: holds one process. The process is on a leash (its stdin), so it ends when this actor does, however that comes."""

    def __init__(self, argv: list[str], log: str, environment: dict[str, str], here: bool) -> None:
        self._age = seconds_alive()
        if not here:  # another host perhaps: its own interpreter, and an address the others can reach
            argv = on_this_node(argv)
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stderr:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
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

    def signal(self, number: int) -> None:
        self._process.send_signal(number)


def on_this_node(argv: list[str]) -> list[str]:
    """`argv` with this node's interpreter, listening at this node's address."""
    at = argv.index("--spec") + 1
    spec = json.loads(argv[at])
    address: Any = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    spec["listen"] = f"{address}:0"
    return [sys.executable, *argv[1:at], json.dumps(spec), *argv[at + 1 :]]
