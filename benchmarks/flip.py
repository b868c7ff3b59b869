"""How long does a worker take to change its role in place, and how long when it leaves and another starts?

    python -m diptych.benchmarks.flip [--flips 5] [--model M] [--dtype bfloat16]

A cluster of two prefill and one decode worker, plain processes, idle but for what the changes themselves do. By turns one prefill worker
becomes a decode worker in place and comes back, and one leaves, another starts, and the same back. The clock runs from the supervisor's
being asked until it says that the new worker has joined: drained, ready, and seen by the router.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

from diptych.benchmarks.record import describe, keep, summary, surroundings
from diptych.cluster.supervising import state
from diptych.cluster.supervising.control import Numbers, ask
from diptych.core.fleet import Phase

NAME = "benchmark-flip"
UP_S = 300.0
MORE_DECODE: Numbers = {Phase.PREFILL: (1,), Phase.DECODE: (2,)}
MORE_PREFILL: Numbers = {Phase.PREFILL: (2,), Phase.DECODE: (1,)}
WAYS: dict[str, tuple[tuple[Numbers, ...], tuple[Numbers, ...]]] = {
    "in place": ((MORE_DECODE,), (MORE_PREFILL,)),
    "leave and start": (({Phase.PREFILL: (1,)}, {Phase.DECODE: (2,)}), ({Phase.DECODE: (1,)}, {Phase.PREFILL: (2,)})),
}
"""There and back, each in one or two orders."""


@contextmanager
def cluster(options: argparse.Namespace) -> Iterator[str]:
    """The id of one that serves."""
    words = [str(Path(sys.executable).with_name("diptych")), "up", "--no-ray", "--name", NAME, "--prefill", "2", "--dtype", options.dtype]
    words += ["--http-port", "0", "--grpc-port", "0", *(["--model", options.model] if options.model else [])]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONSAFEPATH": "1"})
        try:
            late = time.monotonic() + UP_S
            while not ((known := state.read(NAME)) and known.ready):
                if process.poll() is not None or time.monotonic() > late:
                    said.seek(0)
                    raise RuntimeError(said.read().decode(errors="replace"))
                time.sleep(0.1)
            yield known.id
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def change(cluster_id: str, orders: Sequence[Numbers]) -> float:
    """Seconds until the new worker has joined, the last word but `done` of the last order. Raises `RuntimeError` if it is another's."""
    began = joined = time.monotonic()
    last = ""
    for order in orders:
        for said in ask(cluster_id, order):
            last, joined = said, time.monotonic()
    if "has joined" not in last or ("processes of" in last) != (len(orders) == 1):
        raise RuntimeError(f"not what was to be timed: {last}")
    return joined - began


def measure(cluster_id: str, flips: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for way in islice(cycle(WAYS), len(WAYS) * flips):
        for orders, to in zip(WAYS[way], ("decode", "prefill"), strict=True):
            took = change(cluster_id, orders)
            seconds.setdefault(f"{way}, to {to}", []).append(took)
            print(f"{way:15} to {to:8} {took:7.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.flip", description="How soon has a worker another role?")
    parser.add_argument("--flips", type=int, default=5, help="there and back, each way")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    with cluster(options) as cluster_id:
        seconds = measure(cluster_id, options.flips)
    results = {name: summary(each) for name, each in seconds.items()}
    for name, each in results.items():
        print(f"{name:25} p50 {each['p50_ms']:7.0f} ms, max {each['max_ms']:7.0f} ms")
    print(f"kept in {keep('flip', where, vars(options), results)}")


if __name__ == "__main__":
    main()
