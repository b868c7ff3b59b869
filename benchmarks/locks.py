"""What do locks cost? CPU seconds of router and workers per request, with TLS, mutual TLS and API keys, and without.

    python -m diptych.benchmarks.locks [--pairs 12] [--requests 16] [--prompt 256] [--output 64] [--model M]

Two clusters serve side by side, alike but for their locks, and take turns: a block of requests to one, then to the other, the order
changing from pair to pair. Each block is charged with the CPU time (user and system, from /proc) that all processes of its cluster used
from its first request to its last answer; a cluster that rests meanwhile is not charged. Requests come over HTTP, as streams, four at a
time, half of them on a connection of their own, so that handshakes are among what is paid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from diptych.benchmarks.record import describe, keep, surroundings
from diptych.cluster.process import processes
from diptych.cluster.process.certs import write_all
from diptych.core.api_keys import ApiKeyFile, new_key

START_S = 180.0
AT_ONCE = 4
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cluster:
    """One that serves. `verify`: how its router is known."""

    id: str
    url: str
    headers: dict[str, str]
    verify: ssl.SSLContext | bool

    def cpu_s(self) -> float:
        """Of all its processes but the supervisor, since their start."""
        return sum(map(_cpu_s, processes.marked(self.id)))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


@contextmanager
def serving(name: str, directory: Path, model: str | None, *, locked: bool) -> Iterator[Cluster]:
    """`diptych up`, until it serves; ended afterwards."""
    key, kept = new_key("benchmark")
    security: dict[str, Any] = {}
    if locked:
        write_all(directory, [], days=1)
        (directory / "keys.json").write_text(ApiKeyFile(keys=(kept,)).model_dump_json())
        files = {name: str(directory / f"{name}.pem") for name in ("ca", "internal", "server")}
        security = {
            "api_keys": str(directory / "keys.json"),
            "tls": {"cert": files["server"], "key": str(directory / "server.key")},
            "internal_tls": {"ca": files["ca"], "cert": files["internal"], "key": str(directory / "internal.key")},
        }
    config = {
        "name": name, "model": {"source": model}, "security": security, "ray": {"enabled": False},
        "prefill": {"threads": 1}, "decode": {"threads": 1}, "router": {"http_port": 0, "grpc_port": 0},
    }  # fmt: skip
    file = directory / f"{name}.yaml"
    file.write_text(json.dumps(config))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "diptych.cluster.cli", "up", "-f", str(file)]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        state = _ready(directory / "diptych" / name / "cluster.json", running)
        headers = {"authorization": f"Bearer {key}"} if locked else {}
        verify = ssl.create_default_context(cafile=directory / "ca.pem") if locked else True
        yield Cluster(str(state["id"]), f"{'https' if locked else 'http'}://{state['http']}", headers, verify)
    finally:
        running.terminate()
        running.wait()


def _ready(file: Path, running: subprocess.Popen[bytes]) -> dict[str, Any]:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and running.poll() is None:
        if file.exists() and (state := json.loads(file.read_text()))["ready"]:
            return dict(state)
        time.sleep(0.1)
    raise RuntimeError("the cluster does not serve")


async def block(cluster: Cluster, requests: int, prompt: int, output: int, seed: int) -> float:
    """CPU seconds per request."""
    draw = random.Random(seed)
    bodies = [
        {"prompt": [draw.randrange(10, 10_000) for _ in range(prompt)], "max_tokens": output, "ignore_eos": True, "stream": True}
        for _ in range(requests)
    ]
    waiting = iter(enumerate(bodies))
    before = cluster.cpu_s()
    async with _client(cluster) as kept:

        async def ask() -> None:
            for number, body in waiting:
                if number % 2:
                    await _ask(kept, body)
                else:
                    async with _client(cluster) as fresh:
                        await _ask(fresh, body)

        await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return (cluster.cpu_s() - before) / requests


def _client(cluster: Cluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, headers=cluster.headers, verify=cluster.verify, timeout=300)


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        text = (await answer.aread()).decode()
    if answer.status_code != httpx.codes.OK or not text.rstrip().endswith("[DONE]"):
        raise RuntimeError(f"{answer.status_code}: {text[-300:]}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """`ratio`: of the sums; `low` and `high` bound it with 95 % by resampling pairs."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diptych-benchmark-")))
        clusters = {
            locked: stack.enter_context(serving("locked" if locked else "open", directory, options.model, locked=locked))
            for locked in (True, False)
        }
        pairs: list[dict[bool, float]] = []
        for number in range(options.pairs + 1):
            pair = {}
            for locked in (True, False) if number % 2 else (False, True):
                pair[locked] = asyncio.run(block(clusters[locked], options.requests, options.prompt, options.output, number))
            pairs.append(pair)
    pairs = pairs[1:]  # the first warms up
    draw = random.Random(0)
    ratios = sorted(_ratio([draw.choice(pairs) for _ in pairs]) for _ in range(2000))
    each = {name: statistics.mean(pair[locked] for pair in pairs) for name, locked in (("locked", True), ("open", False))}
    return {"ratio": _ratio(pairs), "low": ratios[50], "high": ratios[1949], "pairs": len(pairs), "cpu_s_per_request": each}


def _ratio(pairs: list[dict[bool, float]]) -> float:
    return sum(pair[True] for pair in pairs) / sum(pair[False] for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.locks", description="What do TLS and API keys cost?")
    parser.add_argument("--pairs", type=int, default=12, help="blocks with locks, and as many without")
    parser.add_argument("--requests", type=int, default=16, help="in each block")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="output tokens")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--busy", action="store_true", help="note that the machine was doing other things")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    results = measure(options)
    print(f"with locks {results['ratio']:.4f} ({results['low']:.4f} to {results['high']:.4f}) times the CPU seconds of without")
    print(keep("locks", where, vars(options), results))


if __name__ == "__main__":
    main()
