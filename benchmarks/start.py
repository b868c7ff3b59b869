"""How long from `diptych up` to the first token? A prepared model, the real command line, on Ray or (--no-ray) plain processes.

    python -m diptych.benchmarks.start [--runs 3] [--no-ray] [--model M] [--dtype bfloat16]

The clock starts before the command's process does and stops when a client that has been knocking all the while has its first token. The
time line is the command's own (`up -v`).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from diptych.benchmarks.record import describe, keep, surroundings
from diptych.core.errors import Unavailable
from diptych.core.generate import Generate
from diptych.core.sampling import SamplingParams
from diptych.rpc.inference import SyncInferenceClient

PROMPT = "The capital of France is"
LIMIT_S = 120.0
KNOCK_S = 0.05


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_token(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return when a request to `address` has its first token; raises if `process` ends or `LIMIT_S` passes before."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit and process.poll() is None:
        with SyncInferenceClient(address) as client:
            try:
                next(client.generate(Generate(PROMPT, sampling=SamplingParams(max_tokens=2, temperature=0.0))))
            except Unavailable:
                time.sleep(KNOCK_S)  # nobody listens yet: a refused connection tells nobody when it will be accepted
            else:
                return
    raise RuntimeError(f"no token: the command {'still runs' if process.poll() is None else 'ended'}")


def command(options: argparse.Namespace, port: int) -> list[str]:
    words = [sys.executable, "-m", "diptych.cluster.cli", "up", "-v", "--dtype", options.dtype]
    words += ["--http-port", "0", "--grpc-port", str(port)]
    words += ["--model", options.model] if options.model else []
    return [*words, "--no-ray"] if options.no_ray else words


def once(options: argparse.Namespace) -> tuple[float, str]:
    """Seconds to the first token, and what the command said."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="diptych-benchmark-") as scratch:
        said = Path(scratch) / "said"
        with said.open("wb") as out:
            began = time.monotonic()
            process = subprocess.Popen(
                command(options, port), stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONSAFEPATH": "1"}
            )
            try:
                first_token(f"127.0.0.1:{port}", process)
                seconds = time.monotonic() - began
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
        return seconds, said.read_text(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.start", description="How long to the first token?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    seconds, said = zip(*(once(options) for _ in range(options.runs)), strict=True)
    print(said[-1])
    result: dict[str, Any] = {"first_token_s": list(seconds), "time_line": said[-1].splitlines()}
    print(f"first token after {', '.join(f'{second:.1f}' for second in seconds)} s")
    name = "start-no-ray" if options.no_ray else "start"
    print(f"kept in {keep(name, where, vars(options), result)}")


if __name__ == "__main__":
    main()
