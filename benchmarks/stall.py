"""Do prompts stall answers? One load, twice: prefill and decode apart, and together in one worker (colocated).

    python -m diptych.benchmarks.stall [--rate 0.75] [--seconds 120] [--input 256] [--output 64] [--dtype bfloat16] [--model M]
    python -m diptych.benchmarks.stall --device cuda --model DIR [...]

Apart, the prefill worker has one core and the decode worker another; together, one worker has both. On a GPU both workers share one, with
half of its memory each that the one worker has. ITL counts from token 2 on; the gap between tokens 1 and 2, which holds the hand-over, is
reported by itself. Times are the client's.
"""

from __future__ import annotations

import argparse
from itertools import chain
from typing import Any

from diptych.benchmarks import open_loop
from diptych.benchmarks.gpu import described, need_gpu
from diptych.benchmarks.record import describe, keep, summary, surroundings
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.rpc.inference import InferenceClient

WARM_UP = 3
"""Requests sent one after another before the load, and not counted."""
GPU_SHARE = 0.45
"""Of a GPU's memory, for each of two workers; what workers on it have by default is 0.9."""


def clusters(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The configs that are compared. On a host with several GPUs all workers are on the first that has room, so on one."""
    counts = {"apart": (1, 1), "colocated": (0, 1)}
    found: dict[str, dict[str, Any]] = {}
    for name, (prefill, decode) in counts.items():
        config = found[name] = settings(prefill=prefill, decode=decode, model=options.model, dtype=options.dtype)
        config["device"] = options.device
        if options.device == "cuda":
            for phase in ("prefill", "decode"):
                config[phase]["memory_fraction"] = 2 * GPU_SHARE / (prefill + decode)
    return found


def measure(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run the load against the cluster `config` describes; summaries in milliseconds."""
    answers: list[open_loop.Answer] = []

    async def load(served: Served) -> None:
        async with InferenceClient(served.grpc) as client:
            vocabulary = served.card.vocab_size
            for number in range(WARM_UP):
                await open_loop.ask(client, open_loop.prompt(options.input, -1 - number, vocabulary), options.output)
            times = open_loop.arrivals(options.rate, options.seconds, options.seed)
            answers.extend(
                await open_loop.run(client, times, input_tokens=options.input, output_tokens=options.output, vocabulary=vocabulary)
            )

    serve(config, load)
    return summarise(answers)


def summarise(answers: list[open_loop.Answer]) -> dict[str, Any]:
    itl = summary(list(chain.from_iterable(answer.itl for answer in answers)))
    finishes = [answer.finish for answer in answers if answer.finish is not None]
    return {
        "requests": len(answers),
        "handed_over": sum(bool(finish.timing.transport) for finish in finishes),
        "kv_bytes": sum(finish.timing.kv_bytes for finish in finishes),
        "attempts": sum(finish.timing.attempts for finish in finishes),
        "ttft": summary([answer.ttft for answer in answers]),
        "tpot": summary([answer.tpot for answer in answers]),
        "gap": summary([answer.gap for answer in answers]),
        "itl": itl,
        "itl_p99_over_p50": itl["p99_ms"] / itl["p50_ms"],
    }


def table(apart: dict[str, Any], together: dict[str, Any]) -> str:
    lines = [f"{'':28}{'apart':>12}{'colocated':>12}"]
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("gap", "token 1 to 2"), ("itl", "ITL from token 2")):
        for figure in ("p50_ms", "p99_ms"):
            heading = f"{label} {figure[:3]} (ms)"
            lines.append(f"{heading:28}{apart[name][figure]:12.1f}{together[name][figure]:12.1f}")
    lines.append(f"{'ITL p99 / p50':28}{apart['itl_p99_over_p50']:12.2f}{together['itl_p99_over_p50']:12.2f}")
    lines.append(f"{'requests (handed over)':28}{_counts(apart):>12}{_counts(together):>12}")
    return "\n".join(lines)


def _counts(result: dict[str, Any]) -> str:
    return f"{result['requests']} ({result['handed_over']})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.stall", description="Do prompts stall answers?")
    parser.add_argument("--rate", type=float, default=0.75, help="requests per second, Poisson")
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the load")
    parser.add_argument("--input", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="output tokens")
    parser.add_argument("--seed", type=int, default=1, help="of the arrival times, the same for both")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: on one GPU, shared")
    options = parser.parse_args()
    device = need_gpu() if options.device == "cuda" else None
    where = surroundings()
    if device is not None:
        where["gpu"] = described(device)
    print(describe(where))
    results = {name: measure(config, options) for name, config in clusters(options).items()}
    print(table(results["apart"], results["colocated"]))
    print(f"kept in {keep('stall' if device is None else 'stall-gpu', where, vars(options), results)}")


if __name__ == "__main__":
    main()
