"""One load on Diptych with prefill and decode apart, Diptych colocated, vLLM and transformers, one after another; one table.

    python -m diptych.benchmarks.peers [--rate 0.75] [--requests 60] [--input 256] [--output 64] [--slo ttft=1s,tpot=100ms] [--budget 240]

Every server has the whole machine, the demo model in bfloat16 and the same seeded load from `diptych bench`, in a process of its own
beside it. A server that is not installed is skipped, and named with how to install it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from diptych.benchmarks.peers.servers import NotStarted, Peer, peers
from diptych.benchmarks.peers.table import table
from diptych.benchmarks.peers.weights import hugging_face_directory
from diptych.benchmarks.record import describe, keep, surroundings


def measure(peer: Peer, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The load at its rate, then the search for the goodput, unless its budget is 0."""
    with tempfile.TemporaryDirectory() as scratch, peer.serving(model, Path(scratch, "server.log")) as url:
        load = ["--rate", options.rate, "--input", options.input, "--output", options.output, "--seed", options.seed]
        load += ["--slo", options.slo, "--timeout", options.timeout]
        found = _bench(Path(scratch), url, *load, "--requests", options.requests, "--warm-up", options.warm_up)["report"]
        if options.budget:
            limits = ["--goodput", "--budget", options.budget, "--probe-requests", options.probe_requests, "--warm-up", 2]
            search = _bench(Path(scratch), url, *load, *limits)
            found["goodput"] = search["goodput"] | {"probes": search["probes"]}
    return {"version": peer.version, **found}


def _bench(scratch: Path, url: str, *arguments: object) -> dict[str, Any]:
    out = scratch / "bench.json"
    command = [sys.executable, "-P", "-m", "diptych.cluster.cli", "bench", url, *map(str, arguments), "--json", str(out)]
    subprocess.run(command, check=True)
    values: dict[str, Any] = json.loads(out.read_text())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.peers", description="One load on us and on our peers.")
    parser.add_argument("--rate", type=float, default=0.75, help="requests per second, Poisson")
    parser.add_argument("--requests", type=int, default=60, help="of the load at that rate, warm-up included")
    parser.add_argument("--warm-up", type=int, default=5, help="requests not counted")
    parser.add_argument("--input", default="256", help="prompt tokens")
    parser.add_argument("--output", default="64", help="output tokens")
    parser.add_argument("--slo", default="ttft=1s,tpot=100ms")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds the search for each goodput may take; 0: no search")
    parser.add_argument("--probe-requests", type=int, default=120, help="the most requests of one probe")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a request is an error")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="a part of a server's name; may be given several times")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers are ended on the way out
    where = surroundings()
    print(describe(where))
    model = hugging_face_directory()
    results: dict[str, Any] = {}
    for peer in peers():
        if options.only and not any(part.lower() in peer.name.lower() for part in options.only):
            continue
        print(f"\n{peer.name} {peer.version}", flush=True)
        if peer.missing:
            print(f"skipped: {peer.missing}")
            results[peer.name] = {"skipped": peer.missing}
            continue
        try:
            results[peer.name] = measure(peer, model, options)
        except (NotStarted, subprocess.CalledProcessError) as error:
            print(f"failed: {error}")
            results[peer.name] = {"failed": str(error)}
        except KeyboardInterrupt:
            results[peer.name] = {"skipped": "interrupted"}
            break
    print(f"\n{table(results)}")
    print(f"kept in {keep('peers', where, vars(options), results)}")


if __name__ == "__main__":
    main()
