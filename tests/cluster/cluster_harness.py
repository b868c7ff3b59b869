"""A cluster as a process of its own, seen from outside: what it printed, what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import starmap
from pathlib import Path

from diptych.cluster.process import processes
from diptych.cluster.supervising.control import Numbers, ask
from diptych.core.layout import DType
from diptych.core.model import CARD, Decoder, ModelCard, Rope

WAIT_S = 30.0


def wait_for(what: str, condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Until `condition` holds; fails with `what` after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {within_s} s"
        time.sleep(0.01)


def write_card(directory: Path, *, name: str = "tiny", weights_bytes: int = 1000) -> Path:
    """A prepared model without weights: enough for everything but a worker."""
    directory.mkdir(parents=True, exist_ok=True)
    decoder = Decoder(
        family="llama",
        layers=4,
        hidden=8,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=16,
        activation="silu",
        norm_eps=1e-6,
        query_scale=1.0,
        tied_head=True,
        windows=(0,) * 4,
        rope_full=Rope(theta=10000.0),
    )
    card = ModelCard(
        name=name,
        source="test",
        fingerprint="f" * 64,
        dtype=DType.FLOAT32,
        vocab_size=100,
        max_context=512,
        bos_token_id=1,
        eos_token_ids=(2,),
        has_chat_template=False,
        weights_bytes=weights_bytes,
        decoder=decoder,
    )
    (directory / CARD).write_text(card.model_dump_json())
    return directory


class Cluster:
    """A running command; `output` is everything it has written."""

    def __init__(self, argv: list[str], environment: dict[str, str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            cwd=cwd,
            start_new_session=True,
        )
        self.runtime = Path(environment["XDG_RUNTIME_DIR"])
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)  # one by one

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def expect(self, text: str, within_s: float = WAIT_S) -> None:
        end = time.monotonic() + within_s
        while text not in self.output:
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"no {text!r} within {within_s} s:\n{self.output}"
            time.sleep(0.01)

    def end(self, number: signal.Signals = signal.SIGINT, within_s: float = WAIT_S) -> int:
        """Send `number` and wait; the exit status."""
        self.process.send_signal(number)
        return self.wait(within_s)

    def wait(self, within_s: float = WAIT_S) -> int:
        status = self.process.wait(within_s)
        self._reader.join(5)
        return status

    def state(self, name: str = "default") -> dict[str, object]:
        state: dict[str, object] = json.loads((self.runtime / "diptych" / name / "cluster.json").read_text())
        return state


Start = Callable[..., AbstractContextManager[Cluster]]
"""Starts a cluster of fake programs; sections of its config by name."""


@contextmanager
def running(argv: list[str], environment: dict[str, str], cwd: Path = Path("/"), prefix: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """Run it, elsewhere by a `prefix` (`hosts.Host.prefix`); whatever the test does, nothing runs afterwards."""
    cluster = Cluster([*prefix, sys.executable, *argv], environment, cwd)
    states: list[dict[str, object]] = []
    try:
        yield cluster
    finally:
        for path in cluster.runtime.glob("diptych/*/cluster.json"):
            states.append(json.loads(path.read_text()))
        if cluster.process.poll() is None:
            cluster.process.kill()
        cluster.wait()
        for state in states:
            processes.sweep(str(state["id"]), (Path(str(state["scratch"])),))


def fleets(orders: Path) -> list[tuple[int, dict[str, int]]]:
    path = orders / "fleet"
    return [(version, members) for version, members in map(json.loads, path.read_text().splitlines())] if path.exists() else []


def pid_of(orders: Path, name: str) -> int:
    return int((orders / f"pid-{name}").read_text())


def scaled(cluster: Cluster, wanted: Numbers) -> list[str]:
    return list(ask(str(cluster.state()["id"]), wanted))


def nothing_left(state: dict[str, object]) -> bool:
    """No process of the cluster, no scratch directory, no state file."""
    return not processes.marked(str(state["id"])) and not Path(str(state["scratch"])).exists()


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def sockets_below(directory: str) -> list[str]:
    """Open Unix sockets with a path below `directory`."""
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if directory in line]


def killed_at_once(cluster: Cluster, cluster_id: str) -> None:
    """SIGKILL for the supervisor and every process of the cluster, the reaper among them, before any could do something about it.

    Returns when they have ended: the kernel takes back a killed one's memory first, gigabytes at times, and with it the mark by which it
    is known, then closes its files and sockets.
    """
    pids = processes.marked(cluster_id)
    begun = {pid: processes.start_ticks(pid) or 0 for pid in pids}
    for pid in (cluster.process.pid, *pids):
        with suppress(ProcessLookupError):  # it ended by itself since it was listed
            os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        processes.kill(pid, cluster_id)
    cluster.process.kill()
    cluster.wait()
    wait_for("the end of the killed", lambda: not any(starmap(processes.is_running, begun.items())))
