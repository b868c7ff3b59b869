"""What the machine allows at most: all cores multiply and read as fast as they can, measured in a process of its own.

python -m diptych.benchmarks.peers.bound 256
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys


def bound(prompt_tokens: int) -> dict[str, float]:
    """Least seconds of a prompt so long (`ttft`) and of a decode step of one sequence (`tpot`), of the demo model in bfloat16."""
    command = [sys.executable, "-P", "-m", "diptych.benchmarks.peers.bound", str(prompt_tokens)]
    values: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.peers.bound", description="What does the machine allow at most?")
    parser.add_argument("tokens", type=int, help="of a prompt")
    tokens = parser.parse_args().tokens
    import torch
    from diptych.benchmarks.bare_engine import stored
    from diptych.benchmarks.engine import peak_flops, peak_read
    from diptych.core.layout import DType
    from diptych.engine.location import demo_source
    from diptych.engine.prepared import find_or_prepare, open_prepared

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = demo_source()
    if source is None:
        parser.error("the demo model's package is not installed")
    model = open_prepared(find_or_prepare(source, dtype=DType.BFLOAT16))
    read, flops = peak_read(model), peak_flops(torch.bfloat16)
    matrices, matrices_bytes, _, head_bytes = stored(model)
    times = {"ttft": 2 * matrices * tokens / flops + head_bytes / read, "tpot": (matrices_bytes + head_bytes) / read}
    print(json.dumps(times | {"read_gb_s": read / 1e9, "gflop_s": flops / 1e9}))


if __name__ == "__main__":
    main()
