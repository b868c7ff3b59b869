"""A worker is whole or dead: how long from a rank's death until its worker's other ranks have ended?

    python -m diptych.benchmarks.rank_death [--kills 20] [--model M] [--dtype bfloat16]

Real rank processes of a decode worker, of two shards and of two stages in turn, which writes an answer when its leader, or the other rank,
is sent SIGKILL. The clock stops when the last process of the worker has been waited for. Each kill is of a worker that was just started.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

from diptych.benchmarks.record import describe, keep, summary, surroundings
from diptych.cluster.process.launcher import Launch, PlainLauncher, PlainProcess
from diptych.cluster.process.spec import RankSpec
from diptych.core.commands import Decode, NewTokens
from diptych.core.errors import Unavailable
from diptych.core.fleet import Phase
from diptych.core.layout import DType, even_stages
from diptych.core.model import read_card
from diptych.core.request import Request, Tokens, new_attempt_id
from diptych.core.sampling import SamplingParams
from diptych.engine.location import demo_source
from diptych.engine.prepared import find_or_prepare
from diptych.rpc.worker import WorkerClient

VICTIMS = {"leader": 0, "follower": 1}
SPREADS = ("tp2", "pp2")
PROMPT = tuple(range(100, 116))
ANSWER = 4000
"""Tokens: more than are written before the kill."""


def spec_of(model_dir: Path, spread: str) -> RankSpec:
    layers = read_card(model_dir).decoder.layers
    spreads: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "pp2": {"stages": even_stages(layers, 2)}}
    values: dict[str, Any] = {"worker_id": spread, "phase": Phase.DECODE, "model_dir": model_dir, "kv_tokens": 8192}
    return RankSpec.model_validate({**values, **spreads[spread]})


def launch_of(spec: RankSpec, scratch: Path, leader: str | None = None) -> Launch:
    where = () if leader is None else ("--leader", leader)
    argv = (sys.executable, "-m", "diptych.cluster.programs.rank", "--spec", spec.model_dump_json(), "--leash", *where)
    return Launch(f"{spec.worker_id}.rank{spec.rank}", argv, scratch / f"rank{spec.rank}.log")


async def start(launcher: PlainLauncher, spec: RankSpec, scratch: Path) -> tuple[str, list[PlainProcess]]:
    """A worker of two ranks that is ready: its address, and its processes by rank. Raises `Unavailable` if it cannot be."""
    ranks = [await launcher.start(launch_of(spec, scratch))]
    async for event in ranks[0].lines():
        if event["event"] == "meeting":
            follower = spec.model_copy(update={"rank": 1})
            ranks.append(await launcher.start(launch_of(follower, scratch, event["address"])))
        if event["event"] == "ready":
            return event["address"], ranks
        if event["event"] == "failed":
            raise Unavailable(event["message"])
    raise Unavailable(f"A leader ended before it was ready ({spec.worker_id}).")


async def once(spec: RankSpec, victim: int) -> float:
    """Seconds from the death of rank `victim` to the end of the other."""
    with tempfile.TemporaryDirectory(prefix="diptych-benchmark-") as name:
        scratch = Path(name)
        address, ranks = await start(PlainLauncher(secrets.token_hex(8), scratch), spec, scratch)
        async with WorkerClient(address) as client:
            stream = client.attach()
            asked = Request("r", "", (Tokens(PROMPT),), SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ANSWER))
            stream.send(Decode(new_attempt_id(), asked, local_prefill=True))
            async for step in stream:
                if any(isinstance(event, NewTokens) for event in step.events):
                    break
            began = time.monotonic()
            ranks[victim].kill()
            await asyncio.gather(*(rank.wait() for rank in ranks))
            ended = time.monotonic()
            stream.close()
        return ended - began


async def measure(model_dir: Path, kills: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for spread, victim in islice(cycle(product(SPREADS, VICTIMS)), kills):
        seconds.setdefault(f"{spread} {victim}", []).append(took := await once(spec_of(model_dir, spread), VICTIMS[victim]))
        print(f"{spread} {victim:8} {1000 * took:8.1f} ms", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.rank_death", description="How soon does a worker end with a rank?")
    parser.add_argument("--kills", type=int, default=20, help="in all, of leaders and followers, of shards and stages in turn")
    parser.add_argument("--model", help="a source of a model; by default the demo model")
    parser.add_argument("--dtype", default="bfloat16", type=DType)
    options = parser.parse_args()
    source = options.model or demo_source()
    if source is None:
        parser.error("the demo model's package is not installed; name a --model")
    where = surroundings()
    print(describe(where))
    seconds = asyncio.run(measure(find_or_prepare(source, dtype=options.dtype), options.kills))
    together = summary([took for each in seconds.values() for took in each])
    print(f"all: p50 {together['p50_ms']:.0f} ms, max {together['max_ms']:.0f} ms")
    results = {"all": together, **{name: summary(each) for name, each in seconds.items()}}
    print(f"kept in {keep('rank_death', where, vars(options), results)}")


if __name__ == "__main__":
    main()
