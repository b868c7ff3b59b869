"""How long from `diptych up` to the first token? A prepared model, the real command line, on Ray or (--no-ray) plain processes.

    python -m diptych.benchmarks.start [--runs 3] [--no-ray] [--model M] [--dtype bfloat16]

The clock starts before the command's process does and stops when a client that has been knocking all the while has its first token, and
again when it has an answer that was handed over. The time line is the command's own (`up -v`).
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

PROMPT = tuple(range(1000, 1064))
"""64 tokens: longer than what a decode worker reads by itself (`router.local_prefill_below`)."""
LIMIT_S = 120.0
KNOCK_S = 0.05


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def knock(address: str, process: subprocess.Popen[bytes], began: float) -> tuple[float, float]:
    """Seconds since `began` to the first token any request got, and to the end of the first whole answer that was handed over
    (until prefill workers are there, decode workers read prompts themselves). Raises if `process` ends or `LIMIT_S` passes before."""
    first = None
    while time.monotonic() - began < LIMIT_S and process.poll() is None:
        with SyncInferenceClient(address) as client:
            try:
                for chunk in client.generate(Generate(PROMPT, sampling=SamplingParams(max_tokens=2, temperature=0.0))):
                    first = first or time.monotonic() - began
                    if chunk.finish and chunk.finish.timing.transport:
                        return first, time.monotonic() - began
            except Unavailable:
                time.sleep(KNOCK_S)  # nobody listens yet: a refused connection tells nobody when it will be accepted
    raise RuntimeError(f"no answer: the command {'still runs' if process.poll() is None else 'ended'}")


def command(options: argparse.Namespace, port: int) -> list[str]:
    words = [str(Path(sys.executable).with_name("diptych")), "up", "-v", "--dtype", options.dtype]
    words += ["--http-port", "0", "--grpc-port", str(port)]
    words += ["--model", options.model] if options.model else []
    return [*words, "--no-ray"] if options.no_ray else words


def once(options: argparse.Namespace) -> tuple[float, float, str]:
    """What `knock` found, and what the command said."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="diptych-benchmark-") as scratch:
        said = Path(scratch) / "said"
        with said.open("wb") as out:
            began = time.monotonic()
            process = subprocess.Popen(
                command(options, port), stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONSAFEPATH": "1"}
            )
            try:
                first, whole = knock(f"127.0.0.1:{port}", process, began)
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
        return first, whole, said.read_text(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.start", description="How long to the first token?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    first, handed_over, said = zip(*(once(options) for _ in range(options.runs)), strict=True)
    print(said[-1])
    result: dict[str, Any] = {"first_token_s": list(first), "first_handed_over_s": list(handed_over), "time_line": said[-1].splitlines()}
    print(f"first token after {', '.join(f'{second:.1f}' for second in first)} s")
    print(f"first answer handed over after {', '.join(f'{second:.1f}' for second in handed_over)} s")
    name = "start-no-ray" if options.no_ray else "start"
    print(f"kept in {keep(name, where, vars(options), result)}")


if __name__ == "__main__":
    main()
