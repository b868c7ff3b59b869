"""A real cluster whose load turns from long prompts to long answers has a worker change its role by itself, and no request fails.

What a step takes is made up, so that the plan is the same on any machine: three workers of a tiny model are never short of time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster_harness import Cluster, nothing_left, wait_for
from diptych.cluster.load.answer import Answer
from diptych.cluster.load.measure import measure
from diptych.cluster.load.mix import Mix, Stream
from diptych.cluster.load.server import find_server
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.latency import DecodeTimes, PrefillTimes, StepTimes
from diptych.cluster.planner.profile import DeviceShare, Link, Model, Parallelism, Profile
from diptych.core.model import ModelCard, read_card
from real_harness import UP_S, diptych, up

LONG_PROMPTS = Stream(rate=4, burstiness=0.5, prompt="180-220", output="4")
LONG_ANSWERS = Stream(rate=4, prompt="16-24", output="80")
TIMES = StepTimes(
    prefill=PrefillTimes(constant=0.01, token=1.5e-3, pair=0.0), decode=DecodeTimes(constant=0.02, context=0.0, row=0.002), hop=0.001
)
FLIP_S = 150.0
"""A window of the new load, two simulations, a restart: 25 s alone."""


def written(card: ModelCard, directory: Path) -> Path:
    """A config and the profile it names. A prefill worker reads 600 tokens a second, a decode worker writes some 220."""
    model = Model(
        name=card.name, dtype=card.dtype, layers=4, heads=4, kv_heads=2, max_context=card.max_context, kv_token_bytes=1e3, weight_bytes=1e3
    )
    profile = Profile(
        source="made up",
        model=model,
        device=DeviceShare(name="d", memory_bytes=1e9),
        parallelisms=(Parallelism(tp=1, times=TIMES, kv_tokens={1: 8192}),),
        links={"node": Link(bytes_per_s=1e9)},
    )
    (directory / "P.json").write_text(profile.model_dump_json())
    values = {
        "model": {"dtype": card.dtype.value},
        "prefill": {"workers": 2, "kv_tokens": 8192, "threads": 1},
        "decode": {"workers": 1, "kv_tokens": 8192, "threads": 1, "max_running": 8},
        "router": {"local_prefill": "never", "record": str(directory / "requests.csv")},
        "autoplan": {
            "mode": "apply", "profile": str(directory / "P.json"), "slo": "ttft=1s,tpot=60ms", "window_s": 20, "every_s": 1,
            "cool_down_s": 10, "least_requests": 40,
        },
    }  # fmt: skip
    (directory / "cluster.yaml").write_text(yaml.safe_dump(values))
    return directory / "cluster.yaml"


class Load:
    """Requests of one stream and then of another, until it is told to end."""

    def __init__(self) -> None:
        self.turn, self.end = threading.Event(), threading.Event()

    def arrivals(self) -> Iterator[Arrival]:
        at = 0.0
        for stream, until in ((LONG_PROMPTS, self.turn), (LONG_ANSWERS, self.end)):
            begin = at
            for arrival in Mix(streams=(stream,)).arrivals(stream.rate, 1):
                if until.is_set():
                    break
                at = begin + arrival.at
                yield Arrival(int(at * 1e6), at, arrival.prompt_tokens, arrival.output_tokens)

    async def run(self, http: str) -> list[Answer]:
        server = await find_server(f"http://{http}", model=None, api_key=None, vocabulary=500, seed=1, timeout_s=120.0, as_text=False)
        return (await measure(server, self.arrivals(), asyncio.Event(), lambda _: None)).answers


def log(cluster: Cluster) -> str:
    return Path(str(cluster.state()["logs"]), "supervisor.log").read_text()


async def turn(cluster: Cluster) -> list[Answer]:
    load = Load()
    serving = asyncio.create_task(load.run(str(cluster.state()["http"])))
    try:
        await asyncio.to_thread(wait_for, "the first look", lambda: "2 prefill + 1 decode stays" in log(cluster), FLIP_S)
        await asyncio.sleep(30)  # of bursts, which are to change nothing
        assert "autoplan: now" not in log(cluster)
        load.turn.set()
        await asyncio.to_thread(wait_for, "the flip", lambda: "autoplan: now 1 prefill + 2 decode" in log(cluster), FLIP_S)
        await asyncio.sleep(30)  # of the load that it was planned for
        assert log(cluster).count("autoplan: now") == 1
    finally:
        load.turn.set()
        load.end.set()
    return await serving


@pytest.mark.nightly
@pytest.mark.timeout(500)
def test_a_load_that_turns_flips_a_worker_and_no_request_fails(
    tiny_gemma3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    config = written(read_card(tiny_gemma3_dir), tmp_path)
    with up(tiny_gemma3_dir, tmp_path / "run", "-f", str(config), "--no-ray") as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        state = cluster.state()
        answers = asyncio.run(turn(cluster))
        assert {answer.error for answer in answers} == {None}
        assert {answer.output_tokens for answer in answers} == {4, 80}
        assert "1 prefill workers, 2 decode workers" in diptych("status").stdout
        assert cluster.end() == 0
    assert nothing_left(state)
    fitted = diptych("workload", "fit", str(tmp_path / "requests.csv"), "-o", str(tmp_path / "W.json"))
    assert f"{len(answers) + 1} requests" in fitted.stdout, "all that was answered, and the generator's own first"
