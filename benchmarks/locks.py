"""What do locks and metrics cost? CPU seconds of router and workers per request, with TLS, mutual TLS, API keys and metrics, and without.

    python -m diptych.benchmarks.locks [--lives 4] [--pairs 4] [--requests 16] [--prompt 256] [--output 64] [--model M]

Two clusters serve side by side, alike but for their locks and metrics, and take turns: a block of requests to one, then to the other, the
order changing from pair to pair. Each block is charged with the CPU time (user and system) that all processes of its cluster used
from its first request to its last answer; a cluster that rests meanwhile is not charged. Requests come over HTTP, as streams, four
at a time, half of them on a connection of their own, so that handshakes are among what is paid.

Two clusters that are quite alike differ by some percent, for as long as they live: one's pages lie better than the other's. So each lives
several times, and who is started first changes. `--control` leaves the locks out of both, which shows what such a measurement can tell.
The engines' threads, nine tenths of it all, know nothing of locks, and their noise is most of the noise: `beside_engine` is the ratio as
if they, and what copies KV, had used as much in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
RESTS = 0.05
"""CPU seconds in a second, of all processes of a cluster that nobody asks anything."""
ROLES, ENGINE = ("prefill", "decode"), "engine"
WITHOUT_METRICS = """
import sys

if "diptych.cluster.programs.route" in sys.orig_argv:
    from diptych.cluster.programs.exporter import Exporter
    from diptych.core.metrics import NullRecorder

    for name in ("inc", "set", "observe"):
        setattr(Exporter, name, getattr(NullRecorder, name))
"""
"""A `sitecustomize`, which Python imports before anything else: a router that records nothing. No config says that, for nobody wants it."""


@dataclass(frozen=True)
class Cluster:
    """One that serves. `verify`: how its router is known."""

    id: str
    url: str
    headers: dict[str, str]
    verify: ssl.SSLContext | bool

    def used(self) -> dict[int, Used]:
        """By each of its processes but the supervisor, since it started."""
        return {pid: Used.of(pid) for pid in processes.marked(self.id)}


@dataclass(frozen=True)
class Used:
    """CPU seconds of a process, and of those of a worker's threads that compute or copy, and so know nothing of locks."""

    role: str
    all: float
    computing: float

    @classmethod
    def of(cls, pid: int) -> Used:
        # The process's own clock, to the nanosecond, has threads that have ended too; see clock_getcpuclockid(3).
        return cls(_role(pid), time.clock_gettime((~pid << 3) | 2), sum(_computing(pid)))

    def since(self, before: Used) -> Counter[str]:
        """Of workers what computes apart."""
        whole, computing = self.all - before.all, self.computing - before.computing
        if self.role not in ROLES:
            return Counter({self.role: whole})
        return Counter({f"{self.role}, {ENGINE}": computing, self.role: whole - computing})


def _role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text()
    return next(
        (role for role in ROLES if f'"phase":"{role}"' in words), "router" if "diptych.cluster.programs.route" in words else "others"
    )


def _computing(pid: int) -> Iterator[float]:
    """All but the first thread, which runs asyncio, and grpc's, which have names of their own: TLS is theirs."""
    tasks = Path(f"/proc/{pid}/task")
    ours = (tasks / str(pid) / "comm").read_text()
    for task in tasks.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if task.name != str(pid) and (task / "comm").read_text() == ours:
                yield int((task / "schedstat").read_text().split()[0]) / 1e9


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
    if not locked:
        (directory / "sitecustomize.py").write_text(WITHOUT_METRICS)
        environment["PYTHONPATH"] = str(directory)
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


def rest(cluster: Cluster) -> None:
    """Until it uses next to nothing: for some seconds after it serves, workers still take the pages of their pools."""
    give_up, before = time.monotonic() + START_S, _all(cluster)
    while time.monotonic() < give_up:
        time.sleep(1.0)
        now = _all(cluster)
        if now - before < RESTS:
            return
        before = now
    raise RuntimeError("the cluster never rests")


def _all(cluster: Cluster) -> float:
    return sum(used.all for used in cluster.used().values())


async def block(cluster: Cluster, requests: int, prompt: int, output: int, seed: int) -> Counter[str]:
    """CPU seconds of each role, of all requests together."""
    draw = random.Random(seed)
    bodies = [
        {"prompt": [draw.randrange(10, 10_000) for _ in range(prompt)], "max_tokens": output, "ignore_eos": True, "stream": True}
        for _ in range(requests)
    ]
    waiting = iter(enumerate(bodies))
    before = cluster.used()
    async with _client(cluster) as kept:

        async def ask() -> None:
            for number, body in waiting:
                if number % 2:
                    await _ask(kept, body)
                else:
                    async with _client(cluster) as fresh:
                        await _ask(fresh, body)

        await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return sum((used.since(before[pid]) for pid, used in cluster.used().items()), Counter[str]())


def _client(cluster: Cluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, headers=cluster.headers, verify=cluster.verify, timeout=300)


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        text = (await answer.aread()).decode()
    if answer.status_code != httpx.codes.OK or not text.rstrip().endswith("[DONE]"):
        raise RuntimeError(f"{answer.status_code}: {text[-300:]}")


Pair = dict[bool, Counter[str]]
"""What a block with locks took, and one without."""


def live(options: argparse.Namespace, number: int) -> list[Pair]:
    """One life of both clusters."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diptych-benchmark-")))
        clusters: dict[bool, Cluster] = {}
        for first in _in_turn(number):
            name, locked = ("first" if first else "second"), first and not options.control
            clusters[first] = stack.enter_context(serving(name, directory, options.model, locked=locked))
        for cluster in clusters.values():
            rest(cluster)
        pairs: list[Pair] = []
        for turn in range(options.pairs + 1):
            seed = number * (options.pairs + 1) + turn
            asked = (options.requests, options.prompt, options.output, seed)
            pairs.append({first: asyncio.run(block(clusters[first], *asked)) for first in _in_turn(turn)})
        return pairs[1:]  # the first warms up


def _in_turn(number: int) -> tuple[bool, bool]:
    return (True, False) if number % 2 else (False, True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Ratios are of sums; `low` and `high` bound them with 95 % by resampling lives, and pairs in them."""
    lives = [live(options, number) for number in range(options.lives)]
    pairs = [pair for life in lives for pair in life]
    each = {name: _each(pairs, locked, options.requests) for name, locked in (("locked", True), ("open", False))}
    return {**_bounded(lives, _ratio), "beside_engine": _bounded(lives, _beside), "cpu_s_per_request": each}


def _bounded(lives: Sequence[Sequence[Pair]], ratio: Callable[[Sequence[Pair]], float]) -> dict[str, Any]:
    draw = random.Random(0)
    again = ([pair for life in draw.choices(lives, k=len(lives)) for pair in draw.choices(life, k=len(life))] for _ in range(2000))
    ratios = sorted(map(ratio, again))
    found = ratio([pair for life in lives for pair in life])
    return {"ratio": found, "low": ratios[50], "high": ratios[1949], "by_life": [ratio(life) for life in lives]}


def _each(pairs: Sequence[Pair], locked: bool, requests: int) -> dict[str, float]:
    """Of a request, by role."""
    used = sum((pair[locked] for pair in pairs), Counter[str]())
    return {role: seconds / len(pairs) / requests for role, seconds in sorted(used.items())}


def _ratio(pairs: Sequence[Pair]) -> float:
    return sum(pair[True].total() for pair in pairs) / sum(pair[False].total() for pair in pairs)


def _beside(pairs: Sequence[Pair]) -> float:
    """As if the engines with locks had used what those without did."""
    more = sum(used for pair in pairs for role, used in (pair[True] - pair[False]).items() if ENGINE not in role)
    less = sum(used for pair in pairs for role, used in (pair[False] - pair[True]).items() if ENGINE not in role)
    return 1 + (more - less) / sum(pair[False].total() for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.locks", description="What do TLS, keys and metrics cost?")
    parser.add_argument("--lives", type=int, default=4, help="how often both clusters are started; an even number treats them alike")
    parser.add_argument("--pairs", type=int, default=4, help="in each life blocks with locks, and as many without")
    parser.add_argument("--requests", type=int, default=16, help="in each block")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="output tokens")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--control", action="store_true", help="no locks in either; nothing is kept")
    parser.add_argument("--busy", action="store_true", help="note that the machine was doing other things")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    results = measure(options)
    for what, found in (("", results), (" beside the engines", results["beside_engine"])):
        print(f"with locks{what} {found['ratio']:.4f} ({found['low']:.4f} to {found['high']:.4f}) times the CPU seconds of without")
    print(json.dumps(results, indent=1) if options.control else keep("locks", where, vars(options), results))


if __name__ == "__main__":
    main()
