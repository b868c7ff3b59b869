"""The same loads on Diptych with prefill and decode apart, Diptych colocated, vLLM and transformers, one after another; two tables and a
picture.

    python -m diptych.benchmarks.peers [--rate 0.75] [--requests 60] [--input 256] [--output 64] [--slo ttft=1s,tpot=100ms] [--budget 240]

Every server has the whole machine, the demo model in bfloat16 and the same seeded loads from `diptych bench`, in a process of its own
beside it: one request at a time, 16 at once, a steady load, long prompts, and the search for the goodput. A server that is not installed
is skipped, and named with how to install it. With vLLM and transformers 40 minutes.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.benchmarks.peers.bound import bound
from diptych.benchmarks.peers.loads import Load, loads
from diptych.benchmarks.peers.servers import NotStarted, Peer, first_token, peers
from diptych.benchmarks.peers.table import table
from diptych.benchmarks.peers.weights import hugging_face_directory
from diptych.benchmarks.record import describe, keep, surroundings


def measure(peer: Peer, model: Path, prompt_tokens: int, chosen: Iterable[Load]) -> dict[str, Any]:
    """How long it takes to start, and what it makes of each load."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, peer.serving(model, Path(scratch, "server.log")) as url:
        first_token(url, prompt_tokens)
        found: dict[str, Any] = {"version": peer.version, "start_s": time.monotonic() - begin}
        print(f"first token after {found['start_s']:.1f} s", flush=True)
        for load in chosen:
            if peer.together or not load.patient:
                print(f"\n{peer.name}: {load.name}", flush=True)
                found[load.name] = _bench(Path(scratch), url, *load.arguments)
    return found


def _bench(scratch: Path, url: str, *arguments: object) -> dict[str, Any]:
    out = scratch / "bench.json"
    command = [sys.executable, "-P", "-m", "diptych.cluster.cli", "bench", url, *map(str, arguments), "--json", str(out)]
    subprocess.run(command, check=True)
    values: dict[str, Any] = json.loads(out.read_text())
    if "goodput" in values:
        return {"goodput": values["goodput"], "probes": values["probes"]}
    report: dict[str, Any] = values["report"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.peers", description="The same loads on us and on our peers.")
    parser.add_argument(
        "--rate", type=float, default=0.75, help="requests per second of the steady load, Poisson; the first that the search tries"
    )
    parser.add_argument("--requests", type=int, default=60, help="of the steady load, warm-up included")
    parser.add_argument("--warm-up", type=int, default=5, help="requests of the steady load that are not counted")
    parser.add_argument("--input", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="output tokens")
    parser.add_argument("--slo", default="ttft=1s,tpot=100ms")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds the search for each goodput may take; 0: no search")
    parser.add_argument("--probe-requests", type=int, default=120, help="the most requests of one probe")
    parser.add_argument("--only", action="append", help="a part of a server's name; may be given several times")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers are ended on the way out
    where = surroundings()
    print(describe(where))
    model, most = hugging_face_directory(), bound(options.input)
    print(f"{most['read_gb_s']:.1f} GB/s, {most['gflop_s']:.0f} GFLOP/s: TTFT, TPOT at least {most['ttft']:.3f} and {most['tpot']:.3f} s")
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
            results[peer.name] = measure(peer, model, options.input, loads(options))
        except (NotStarted, subprocess.CalledProcessError, OSError) as error:
            print(f"failed: {error}")
            results[peer.name] = {"failed": str(error)}
        except KeyboardInterrupt:
            results[peer.name] = {"skipped": "interrupted"}
            break
    print(f"\n{table(results, most)}")
    print(f"kept in {keep('peers', where, vars(options), {'bound': most, 'servers': results})}")


if __name__ == "__main__":
    main()
