"""How long does a hand-over take? From the last layer's KV stored on P to D's first step, D idle.

    python -m diptych.benchmarks.handover [--prompt 1024] [--runs 30] [--dtype bfloat16] [--model M]

The workers stamp the stages of an attempt (`core/stages.py`) at debug level with the monotonic clock, which has one origin on a
host; the stamps of both workers' logs are laid side by side. `kv_stored`: the last layer's KV lies in P's pool. `first_token`: the
step has ended, head and sampling included. `decode_started`: D's first step begins.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from diptych.benchmarks import open_loop
from diptych.benchmarks.record import describe, keep, summary, surroundings
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.core.stages import Stage
from diptych.rpc.inference import InferenceClient
from diptych.worker.timeline import read_stamps

OUTPUT_TOKENS = 8
SPANS = {
    "kv_stored_to_decode_started": (Stage.KV_STORED, Stage.DECODE_STARTED),
    "first_token_to_decode_started": (Stage.FIRST_TOKEN, Stage.DECODE_STARTED),
    "kv_stored_to_first_token": (Stage.KV_STORED, Stage.FIRST_TOKEN),
    "first_token_to_commit_sent": (Stage.FIRST_TOKEN, Stage.COMMIT_SENT),
    "commit_sent_to_committed": (Stage.COMMIT_SENT, Stage.COMMITTED),
    "committed_to_decode_started": (Stage.COMMITTED, Stage.DECODE_STARTED),
}
TRIED = re.compile(r"request=doctor-\S+ attempt=(\S+)")


def stages(logs: Path) -> dict[str, dict[Stage, float]]:
    """Attempt → stage → last time it was reached, from all logs below `logs`; without those by which `up` tries the links."""
    reached: dict[str, dict[Stage, float]] = {}
    texts = [log.read_text(errors="replace") for log in logs.glob("*.log")]
    for text in texts:
        for stage, attempt, at in read_stamps(text.splitlines()):
            reached.setdefault(attempt, {})[stage] = at
    tried = {attempt for text in texts for attempt in TRIED.findall(text)}
    return {attempt: found for attempt, found in reached.items() if attempt not in tried}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One request after another, each alone in the cluster."""
    answers: list[open_loop.Answer] = []

    async def one_by_one(served: Served) -> None:
        async with InferenceClient(served.grpc) as client:
            for number in range(options.warm_up + options.runs):
                ids = open_loop.prompt(options.prompt, number, served.card.vocab_size)
                answers.append(await open_loop.ask(client, ids, OUTPUT_TOKENS))

    with tempfile.TemporaryDirectory(prefix="diptych-benchmark-") as logs:
        sections = {"log": {"level": "debug", "directory": logs}}
        serve(settings(prefill=1, decode=1, model=options.model, dtype=options.dtype, **sections), one_by_one)
        attempts = sorted(stages(Path(logs)).values(), key=lambda reached: reached[Stage.PREFILL_QUEUED])[options.warm_up :]
    answers = answers[options.warm_up :]
    if len(attempts) != len(answers):
        raise RuntimeError(f"{len(answers)} requests made {len(attempts)} attempts: something failed and was tried again")
    finishes = [answer.finish for answer in answers if answer.finish is not None]
    return {
        "runs": len(attempts),
        "kv_bytes": finishes[-1].timing.kv_bytes,
        "transport": finishes[-1].timing.transport,
        **{name: summary([reached[last] - reached[first] for reached in attempts]) for name, (first, last) in SPANS.items()},
        "client_gap": summary([answer.gap for answer in answers]),
        "client_itl": summary([gap for answer in answers for gap in answer.itl]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.handover", description="How long does a hand-over take?")
    parser.add_argument("--prompt", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3, help="requests not counted")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    result = measure(options)
    print(f"{result['runs']} runs, {result['kv_bytes'] / 2**20:.1f} MiB of KV each over {result['transport']}")
    for name in (*SPANS, "client_gap", "client_itl"):
        figures = result[name]
        print(f"{name:32}{figures['p50_ms']:9.2f} ms p50{figures['p99_ms']:9.2f} ms p99{figures['max_ms']:9.2f} ms max")
    print(f"kept in {keep('handover', where, vars(options), result)}")


if __name__ == "__main__":
    main()
