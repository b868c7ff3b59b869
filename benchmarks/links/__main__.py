"""How near does a KV transfer come to its link, and what of it does a request wait for?

    python -m diptych.benchmarks.links [--passes 5] [--transport shm] [--output 256] [--runs 5]

Per transport, two processes with a pool of 512 MiB each, of a model of 32 layers and 4 KiB a token and layer: the whole pool is handed
over in pieces of one size, by `Source` and `Destination` over a lane, and moved in pieces of that size by torch alone; in turn, so that
both meet the same machine. Then one 16-token block of the demo model; then the demo model served, for the share of transfer in a request's
time (`--runs 0`: not). `machines`: a 1,024-token prompt through the hinge's own code, no byte moved. With two GPUs each process has one.
A transport that fails is said and left out, as NCCL is between two processes on one GPU before its version 2.30.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diptych.benchmarks.links.ends import Here, rate, two_workers
from diptych.benchmarks.links.machines import machines_alone
from diptych.benchmarks.links.share import share_of_requests
from diptych.benchmarks.record import describe, keep, percentile, surroundings
from diptych.cluster.programs.rank import see_gpu
from diptych.cluster.resources.devices import visible_gpus
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.transfer import Transport

PIECES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
WIDE = Layout("wide", (CacheGroup(CacheKind.FULL, tuple(range(32)), kv_heads=8, head_dim=128, dtype=DType.BFLOAT16),), 16, (256,))
"""A block of a layer is 64 KiB, the smallest piece; a layer is 16 MiB, the largest."""
FULL = (5, 11, 17)
DEMO = Layout(
    "demo",
    (
        CacheGroup(CacheKind.FULL, FULL, kv_heads=1, head_dim=256, dtype=DType.BFLOAT16),
        CacheGroup(CacheKind.WINDOW, tuple(set(range(18)) - set(FULL)), kv_heads=1, head_dim=256, dtype=DType.BFLOAT16, window=512),
    ),
    16,
    (64, 64),
)
PROMPT = 1024


async def moved(transport: Transport, passes: int) -> dict[str, Any]:
    """By piece size: GB/s of the hinge and of the raw link, their ratio, and CPU seconds of both ends for a GB of each."""
    found = {}
    async with two_workers(WIDE, transport) as here:
        with tempfile.TemporaryDirectory(prefix="diptych-benchmark-") as scratch:
            await join(here, transport, Path(scratch, "store"))
            for piece in PIECES:
                tokens = piece // WIDE.groups[0].token_bytes
                count = WIDE.num_blocks[0] * WIDE.block_size // tokens
                ours, raw = [], []
                for number in range(1 + passes):
                    times = await here.taking(raw_pass(here, transport, piece)), await here.taking(here.pass_over(tokens, count))
                    if number:  # the first meets pages that nobody has touched
                        raw.append(times[0])
                        ours.append(times[1])
                found[f"{piece >> 10} KiB"] = compared(ours, raw)
    return found


def compared(ours: list[tuple[float, float]], raw: list[tuple[float, float]]) -> dict[str, float]:
    """Of passes over the whole pool, each by the seconds and the CPU seconds that it took: medians."""
    fast, fast_raw = (rate(WIDE, [seconds for seconds, _ in passes]) for passes in (ours, raw))
    cpu, cpu_raw = (1 / rate(WIDE, [cpu for _, cpu in passes]) for passes in (ours, raw))
    return {"gb_per_s": fast, "raw_gb_per_s": fast_raw, "ratio": fast / fast_raw, "cpu_s_per_gb": cpu, "raw_cpu_s_per_gb": cpu_raw}


async def join(here: Here, transport: Transport, store: Path) -> None:
    """Make the raw link."""
    if not transport.two_sided:
        await here.ask("map", here.pool.endpoint)
    else:
        here.tell("join", str(store))
        await asyncio.to_thread(here.raw.join, str(store))


async def raw_pass(here: Here, transport: Transport, piece: int) -> float:
    """Seconds to move the whole pool over it."""
    if not transport.two_sided:
        return float(await here.ask("copy", piece))
    here.tell("receive", piece)
    await asyncio.to_thread(here.raw.send, piece)
    return float(await here.hear())


async def one_block(transport: Transport, runs: int = 300) -> float:
    """Median microseconds."""
    async with two_workers(DEMO, transport) as here:
        taken = [await here.last_block() for _ in range(runs)]
    return 1e6 * percentile(taken[runs // 10 :], 0.5)


def measure(transport: Transport, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"pieces": asyncio.run(moved(transport, options.passes)), "block_us": asyncio.run(one_block(transport))}
    if options.runs:
        found["share"] = share_of_requests(transport, model=options.model, prompt=PROMPT, output=options.output, runs=options.runs)
    return found


def show(transport: Transport, found: dict[str, Any]) -> None:
    print(f"\n{transport.value}: one 16-token block of the demo model (288 KiB) {found['block_us']:.0f} µs")
    for piece, figures in found["pieces"].items():
        print(f"{piece:>10}{figures['gb_per_s']:8.2f} GB/s{figures['raw_gb_per_s']:8.2f} raw{figures['ratio']:8.2f}", end="")
        print(f"{figures['cpu_s_per_gb']:8.3f} CPU s/GB{figures['raw_cpu_s_per_gb']:8.3f} raw")
    if share := found.get("share"):
        parts = ", ".join(f"{name} {share[f'{name}_percent']:.4f} %" for name in ("exposed", "overlapped"))
        print(f"of a request of {share['request']:.1f} s: {parts}")


def chosen(asked: Sequence[str] | None) -> list[Transport]:
    """By default all that this machine can measure; `ValueError` if one that is asked for is none of them."""
    lacking = [each for each in Transport if each.on_gpu and not torch.cuda.is_available()]
    if missed := [each.value for each in lacking if asked and each.value in asked]:
        cpu_only = "is built without CUDA" if torch.version.cuda is None else "finds none"
        raise ValueError(
            f"{' and '.join(missed)} cannot be measured here: that takes an NVIDIA GPU, and torch {torch.__version__} {cpu_only}."
        )
    if lacking and not asked:
        print(f"no GPU: {' and '.join(lacking)} not measured")
    return [each for each in Transport if (each.value in asked if asked else each not in lacking)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.links", description="How near does a KV transfer come to its link?")
    parser.add_argument("--passes", type=int, default=5, help="over the whole pool, of each piece size")
    parser.add_argument(
        "--transport", action="append", choices=[each.value for each in Transport], help="by default each that this machine has"
    )
    parser.add_argument("--output", type=int, default=256, help="output tokens of a request")
    parser.add_argument("--runs", type=int, default=5, help="requests of a served model; 0: none")
    parser.add_argument("--model", help="that is served; by default the demo model")
    options = parser.parse_args()
    see_gpu(None)
    try:
        transports = chosen(options.transport)
    except ValueError as error:
        parser.error(f"--transport: {error}")
    torch.set_num_threads(1)
    where = surroundings()
    print(describe(where))
    layers = CacheGroup(CacheKind.FULL, tuple(range(18)), kv_heads=4, head_dim=64, dtype=DType.BFLOAT16)
    alone = machines_alone(Layout("model", (layers,), 16, (PROMPT // 16,)), PROMPT, 200)
    results: dict[str, Any] = {"machines_us": 1e6 * percentile(alone[20:], 0.5), "gpus": [gpu.name for gpu in visible_gpus()[:2]]}
    print(f"machines: {results['machines_us']:.0f} µs for a prompt of {PROMPT} tokens and 18 layers")
    measured = False
    for transport in transports:
        try:
            results[transport.value] = measure(transport, options)
        except Exception:  # noqa: BLE001  whatever it is, the others are measured all the same
            traceback.print_exc()
            print(f"\n{transport.value} could not be measured")
            continue
        show(transport, results[transport.value])
        measured = True
        print(f"kept in {keep('links', where, vars(options), results)}")
    if not measured:
        parser.exit(1)


if __name__ == "__main__":
    main()
