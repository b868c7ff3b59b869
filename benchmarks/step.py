"""Where does a served step's time go? Every process is recorded while requests are answered, one after another and several at once.

    python -m diptych.benchmarks.step [--at-once 1,4] [--requests 6] [--input 256] [--output 128] [--dtype bfloat16] [--model M]

Prefill and decode are apart, a core each. What a step takes in the engine alone says `diptych.benchmarks.engine`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from itertools import chain
from typing import Any

from diptych.benchmarks import open_loop
from diptych.benchmarks.record import describe, keep, summary, surroundings
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.cluster.spans.collect import Collection, recording
from diptych.cluster.spans.shares import Shares, shares_of
from diptych.cluster.spans.table import show_shares
from diptych.cluster.spans.trace import trace_of
from diptych.cluster.supervising import state
from diptych.rpc.inference import InferenceClient
from rich.console import Console

NAME = "benchmark"
"""Of the cluster that `served.settings` describes."""
SECONDS = 300.0
WARM_UP = 2


async def _answers(client: InferenceClient, at_once: int, options: argparse.Namespace, vocabulary: int) -> list[open_loop.Answer]:
    """`at_once` clients, each of which sends its next request when the last is answered."""

    async def one_by_one(first: int) -> list[open_loop.Answer]:
        seeds = (1000 * at_once + first * options.requests + number for number in range(options.requests))
        return [await open_loop.ask(client, open_loop.prompt(options.input, seed, vocabulary), options.output) for seed in seeds]

    return list(chain.from_iterable(await asyncio.gather(*(one_by_one(first) for first in range(at_once)))))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """By how many at once: the client's figures, and every process' shares."""
    results: dict[str, Any] = {}
    out = Console(width=160, highlight=False)

    async def each(served: Served) -> None:
        found = state.running(NAME)
        assert found.control is not None
        async with InferenceClient(served.grpc) as client:
            for number in range(WARM_UP):
                await open_loop.ask(client, open_loop.prompt(options.input, -1 - number, served.card.vocab_size), options.output)
            for at_once in options.at_once:
                async with recording(found.control, found.internal_tls, SECONDS) as taken:
                    answers = await _answers(client, at_once, options, served.card.vocab_size)
                results[str(at_once)] = _figures(out, at_once, answers, taken, options)

    serve(settings(prefill=1, decode=1, model=options.model, dtype=options.dtype), each)
    return results


def _figures(out: Console, at_once: int, answers: list[open_loop.Answer], taken: Collection, options: argparse.Namespace) -> dict[str, Any]:
    shares = [shares_of(process) for process in taken.processes]
    itl = summary(list(chain.from_iterable(answer.itl for answer in answers)))
    tpot, ratio = summary([answer.tpot for answer in answers]), itl["p99_ms"] / itl["p50_ms"]
    out.print(
        f"\n[bold]{at_once} at once[/]: TPOT p50 {tpot['p50_ms']:.1f} ms, "
        f"ITL p50 {itl['p50_ms']:.1f}, p99 {itl['p99_ms']:.1f} ms ({ratio:.2f})"
    )
    show_shares(out, shares)
    if options.trace:
        with open(f"{options.trace}-{at_once}.json", "w") as file:
            json.dump(trace_of(taken.processes), file)
    return {
        "ttft": summary([answer.ttft for answer in answers]),
        "tpot": tpot,
        "gap": summary([answer.gap for answer in answers]),
        "itl": itl,
        "itl_p99_over_p50": ratio,
        "processes": {each.process.name: _kept(each) for each in shares},
    }


def _kept(shares: Shares) -> dict[str, Any]:
    """Without the spans; seconds."""
    steps = shares.steps
    return {
        "per": shares.per,
        "count": shares.count,
        "step": steps and {**asdict(steps), "outside": steps.outside},
        "beside": [asdict(line) for line in shares.beside],
        "cores": [asdict(core) for core in shares.cores],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.step", description="Where does a served step's time go?")
    parser.add_argument("--at-once", type=lambda text: [int(each) for each in text.split(",")], default=[1, 4], metavar="N,N")
    parser.add_argument("--requests", type=int, default=6, help="of each of the clients")
    parser.add_argument("--input", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--trace", metavar="FILE", help="write FILE-N.json for ui.perfetto.dev, too")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    results = measure(options)
    print(f"kept in {keep('step', where, vars(options), results)}")


if __name__ == "__main__":
    main()
