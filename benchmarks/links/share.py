"""Which part of a request's time is KV transfer: what the request waits for, and what goes on while P still computes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from diptych.benchmarks import open_loop
from diptych.benchmarks.handover import stages
from diptych.benchmarks.record import percentile
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.core.stages import Stage
from diptych.core.transfer import Transport
from diptych.rpc.inference import InferenceClient

WARM_UP = 2


def share_of_requests(transport: Transport, *, model: str | None, prompt: int, output: int, runs: int) -> dict[str, Any]:
    """One request of a model (None: the demo model) after another, each alone in the cluster. Medians, in seconds.

    `exposed`: from P's step that gave the first token to D's first step; `until_committed`: the part of it until D has the KV.
    `transfer`: first piece to Commit, at D; `overlapped`: what of that was over when P had the first token.
    """
    answers: list[open_loop.Answer] = []

    async def one_by_one(served: Served) -> None:
        async with InferenceClient(served.grpc) as client:
            for number in range(WARM_UP + runs):
                answers.append(await open_loop.ask(client, open_loop.prompt(prompt, number, served.card.vocab_size), output))

    with tempfile.TemporaryDirectory(prefix="diptych-benchmark-") as logs:
        sections: dict[str, Any] = {"log": {"level": "debug", "directory": logs}, "transfer": {"transports": [transport.value]}}
        if transport.on_gpu:  # which both workers share
            sections |= {phase: {"memory_fraction": 0.4} for phase in ("prefill", "decode")}
        config = settings(prefill=1, decode=1, model=model, dtype="bfloat16", **sections)
        serve(config | {"device": "cuda" if transport.on_gpu else "cpu"}, one_by_one)
        reached = sorted(stages(Path(logs)).values(), key=lambda attempt: attempt[Stage.PREFILL_QUEUED])
    if len(reached) != len(answers):
        raise RuntimeError(f"{len(answers)} requests made {len(reached)} attempts: something failed and was tried again")
    timings = [answer.finish.timing for answer in answers if answer.finish is not None]
    if any(timing.transport != transport for timing in timings):
        raise RuntimeError(f"not every request was handed over by {transport.value}")
    found: dict[str, list[float]] = {name: [] for name in ("request", "exposed", "until_committed", "transfer", "overlapped")}
    for answer, attempt, timing in list(zip(answers, reached, timings, strict=True))[WARM_UP:]:
        waited = attempt[Stage.COMMITTED] - attempt[Stage.FIRST_TOKEN]
        found["request"].append(answer.arrivals[-1])
        found["exposed"].append(attempt[Stage.DECODE_STARTED] - attempt[Stage.FIRST_TOKEN])
        found["until_committed"].append(waited)
        found["transfer"].append(timing.transfer_seconds)
        found["overlapped"].append(max(0.0, timing.transfer_seconds - waited))
    middle = {name: percentile(values, 0.5) for name, values in found.items()}
    shares = {f"{name}_percent": 100 * middle[name] / middle["request"] for name in ("exposed", "until_committed", "overlapped")}
    return {"runs": runs, "kv_bytes": timings[-1].kv_bytes, **middle, **shares}
