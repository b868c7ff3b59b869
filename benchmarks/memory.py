"""How much memory does a worker take, and how much of it is its own?

    python -m diptych.benchmarks.memory [--dtype bfloat16] [--model M]

After some load, each worker's mappings (/proc/PID/smaps) are sorted into weights (the mapped file), KV pool (its own and those of peers
it reads) and the rest. Weights count by PSS: workers of a host share their pages. The rest is compared, private pages only, with a
process that has imported what a worker imports and done nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from diptych.benchmarks import open_loop
from diptych.benchmarks.record import describe, keep, surroundings
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.core.model import WEIGHTS
from diptych.rpc.inference import InferenceClient

RANK = "diptych.cluster.programs.rank"
IMPORT_ONLY = "import os, torch, diptych.cluster.programs.serving; torch.set_num_threads(1); os.write(1, b'.'); os.read(0, 1)"
MIB = 2**20


def smaps(pid: int) -> dict[str, Counter[str]]:
    """Bytes by kind of mapping (`weights`, `pool`, `rest`) and field of smaps (`Pss`, `Private_Dirty`, …)."""
    kinds: dict[str, Counter[str]] = {"weights": Counter(), "pool": Counter(), "rest": Counter()}
    kind = "rest"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = line.split(maxsplit=5)[5] if line.count(" ") >= 5 and len(line.split(maxsplit=5)) == 6 else ""
            kind = "weights" if path.endswith(WEIGHTS) else "pool" if path.startswith("/memfd:") else "rest"
        elif line.endswith(" kB"):
            name, count, _ = line.split()
            kinds[kind][name.rstrip(":")] += int(count) * 1024
    return kinds


def private(fields: Counter[str]) -> int:
    return fields["Private_Clean"] + fields["Private_Dirty"]


def workers() -> dict[str, int]:
    """Worker id → process id of every rank process below this one."""
    found = {}
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    for pid in parents:
        words = _read(Path(f"/proc/{pid}/cmdline")).split("\0")
        if RANK in words and _descends(pid, parents):
            match = re.search(r'"worker_id":\s*"([^"]+)"', " ".join(words))
            if match:
                found[match[1]] = pid
    return dict(sorted(found.items()))


def _parent(process: Path) -> int:
    return int((_read(process / "stat").rpartition(")")[2].split() or ["", "0"])[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return ""


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid and pid != os.getpid():
        pid = parents.get(pid, 0)
    return bool(pid)


async def put_to_work(served: Served) -> None:
    """Long and short prompts, eight at a time: everything a worker allocates lazily is there afterwards."""
    async with InferenceClient(served.grpc) as client, asyncio.TaskGroup() as group:
        for number, tokens in enumerate((1024, 1024, 256, 256, 256, 64, 64, 16)):
            group.create_task(open_loop.ask(client, open_loop.prompt(tokens, number, served.card.vocab_size), 32))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}

    async def look(served: Served) -> None:
        await put_to_work(served)
        idle = await asyncio.create_subprocess_exec(
            sys.executable, "-c", IMPORT_ONLY, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert idle.stdout is not None
        await idle.stdout.readexactly(1)
        before = private(smaps(idle.pid)["rest"])
        maps = {worker: smaps(pid) for worker, pid in workers().items()}
        await idle.communicate(b".")
        weights = served.card.weights_bytes
        result.update(weights_mib=weights / MIB, import_only_private_mib=before / MIB, workers={})
        for worker, kinds in maps.items():
            own = private(kinds["rest"]) - before
            result["workers"][worker] = {
                "pss_mib": sum(kind["Pss"] for kind in kinds.values()) / MIB,
                "weights_pss_mib": kinds["weights"]["Pss"] / MIB,
                "pool_rss_mib": kinds["pool"]["Rss"] / MIB,
                "rest_private_mib": private(kinds["rest"]) / MIB,
                "own_mib": own / MIB,
                "own_over_weights": own / weights,
            }
        result["weights_pss_over_weights"] = sum(kinds["weights"]["Pss"] for kinds in maps.values()) / weights

    serve(settings(prefill=1, decode=1, model=options.model, dtype=options.dtype), look)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.memory", description="How much memory does a worker take?")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    result = measure(options)
    print(f"weights {result['weights_mib']:.0f} MiB; import-only process {result['import_only_private_mib']:.0f} MiB private")
    for worker, figures in result["workers"].items():
        print(
            f"{worker:12} PSS {figures['pss_mib']:6.0f} MiB   weights' share {figures['weights_pss_mib']:6.0f} MiB   "
            f"pools {figures['pool_rss_mib']:6.0f} MiB   beyond imports {figures['own_mib']:6.0f} MiB = "
            f"{figures['own_over_weights']:.3f} × weights"
        )
    print(f"weights counted over all workers: {result['weights_pss_over_weights']:.2f} × their size")
    print(f"kept in {keep('memory', where, vars(options), result)}")


if __name__ == "__main__":
    main()
