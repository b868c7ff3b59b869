"""What a worker's memory is, by the kernel's account: weights shared, the pool, and little else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.core.model import read_card
from e2e_harness import attached, rank_spec, ranks, request

PRIVATE_SHARE = 0.15
"""Of the weights: what a worker may hold for itself beyond its pool and what importing costs anybody."""


def account(pid: int) -> dict[str, int]:
    """The process's smaps_rollup, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(amount.split()[0]) * 1024 for name, amount in (line.split(":") for line in lines)}


def importing() -> dict[str, int]:
    """The account of a process that has only imported what a worker imports."""
    code = "import diptych.cluster.programs.serving; print(open('/proc/self/smaps_rollup').read())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=60, check=True, cwd="/", env=environment)
    lines = run.stdout.decode().strip().splitlines()[1:]
    return {name: int(amount.split()[0]) * 1024 for name, amount in (line.split(":") for line in lines)}


def test_weights_are_shared_and_little_is_private(demo_model_dir: Callable[[DType], Path], tmp_path: Path) -> None:
    model = demo_model_dir(DType.BFLOAT16)
    weights = read_card(model).weights_bytes
    baseline = importing()
    specs = [
        rank_spec(model, phase, f"{phase}-0", kv_tokens=4096, chunk_tokens=chunk)
        for phase, chunk in ((Phase.PREFILL, 512), (Phase.DECODE, 64))
    ]
    with ranks(tmp_path, *specs) as pair:

        async def main() -> None:
            async with attached(*pair) as workers:
                answers = await asyncio.gather(*(workers.disaggregated(request(range(5 + i, 600 + i), max_tokens=8)) for i in range(3)))
                answers.append(await workers.local(request(range(700, 1200), max_tokens=8)))
                assert [answer.error for answer in answers] == [None] * 4
                await workers.idle()

        asyncio.run(main())
        accounts = [account(rank.process.pid) for rank in pair]
    for each in accounts:
        private = each["Anonymous"] - baseline["Anonymous"]
        assert private <= PRIVATE_SHARE * weights, f"{private / 2**20:.0f} MiB are private, of {weights / 2**20:.0f} MiB of weights"
        assert each["Rss"] - each["Pss"] >= 0.4 * weights, "the weights' pages are another process's too"
    files = sum(each["Pss_File"] for each in accounts)
    assert files <= weights + 2 * baseline["Rss"], "the weights count once, not once a worker"
