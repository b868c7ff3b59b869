"""A cluster of fake programs whose load turns: it proposes another split, or has a worker change its role."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster_harness import Cluster, Start, fleets, wait_for
from diptych.cluster.planner.latency import DecodeTimes, PrefillTimes, StepTimes
from diptych.cluster.planner.profile import DeviceShare, Link, Model, Parallelism, Profile
from real_harness import diptych

FLIP_S = 90.0
"""Two looks, each with a process that imports and simulates: 4 s alone."""
TIMES = StepTimes(
    prefill=PrefillTimes(constant=0.01, token=1e-3, pair=0.0), decode=DecodeTimes(constant=0.02, context=0.0, row=0.005), hop=0.001
)
MODEL = Model(name="tiny", dtype="float32", layers=4, heads=4, kv_heads=2, max_context=512, kv_token_bytes=1e3, weight_bytes=1e3)
LONG_PROMPTS, LONG_ANSWERS = (400, 2), (20, 32)
"""Four a second: the second is a third more than one decode worker can write, and two thirds of what two can."""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    known = Profile(
        source="made up",
        model=MODEL,
        device=DeviceShare(name="d", memory_bytes=1e9),
        parallelisms=(Parallelism(tp=1, times=TIMES, kv_tokens={1: 4096}),),
        links={"node": Link(bytes_per_s=1e9)},
    )
    path = tmp_path / "P.json"
    path.write_text(known.model_dump_json())
    return path


def serve(orders: Path, lengths: tuple[int, int]) -> None:
    """From now on the router has recorded 30 seconds of 4 such requests a second."""
    prompt, output = lengths
    rows = [[30 - number / 4, prompt, 0, output, 0.1, 0.02, True] for number in range(120)]
    draft = orders / "window.new"
    draft.write_text(json.dumps([30.0, rows]))
    draft.replace(orders / "window")


def config(profile: Path, mode: str) -> dict[str, object]:
    return {
        "prefill": {"workers": 2, "kv_tokens": 4096},
        "decode": {"workers": 1, "kv_tokens": 4096, "max_running": 4},
        "router": {"http_port": 0, "grpc_port": 0, "local_prefill": "never"},
        "autoplan": {
            "mode": mode, "profile": str(profile), "slo": "ttft=1s,tpot=60ms", "every_s": 1, "cool_down_s": 600, "least_requests": 40,
        },
    }  # fmt: skip


def members(orders: Path) -> set[str]:
    return set(fleets(orders)[-1][1])


def log(cluster: Cluster) -> str:
    return Path(str(cluster.state()["logs"]), "supervisor.log").read_text()


def said_in_order(cluster: Cluster, first: str, then: str) -> bool:
    return 0 < log(cluster).find(first) < log(cluster).find(then)


def test_a_load_that_turns_flips_a_worker(start: Start, orders: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (orders / "cores").write_text("4")
    serve(orders, LONG_PROMPTS)
    with start(**config(profile, "apply")) as cluster:
        cluster.expect("Ctrl-C ends it.")
        wait_for("the first look", lambda: "autoplan: the first look" in log(cluster), FLIP_S)
        assert "2 prefill + 1 decode stays" in log(cluster)
        serve(orders, LONG_ANSWERS)
        wait_for("the flip", lambda: "autoplan: now 1 prefill + 2 decode" in log(cluster), FLIP_S)
        assert members(orders) == {"prefill-0", "decode-0", "decode-1"}
        assert len((orders / "drained").read_text().splitlines()) == 1, "who goes drains first"
        assert "decode-1 has joined, in the processes of prefill-1" in log(cluster)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(cluster.runtime))
        assert "autoplan (apply)" in diptych("status").stdout
        assert cluster.end() == 0


def test_one_that_cannot_change_its_role_goes_back(start: Start, orders: Path, profile: Path) -> None:
    (orders / "refuse-decode-1").touch()
    (orders / "cores").write_text("4")
    serve(orders, LONG_ANSWERS)
    with start(**config(profile, "apply")) as cluster:
        cluster.expect("Ctrl-C ends it.")
        wait_for("the failure", lambda: "autoplan: could not be changed" in log(cluster), FLIP_S)
        assert said_in_order(cluster, "becomes decode-1", "prefill-1 is starting"), "it is not in time for its old role"
        wait_for("the way back", lambda: members(orders) == {"prefill-0", "prefill-1", "decode-0"})
        assert cluster.end() == 0


def test_a_profile_of_another_model_is_refused(start: Start, orders: Path, profile: Path) -> None:
    profile.write_text(profile.read_text().replace('"tiny"', '"other"'))
    with start(**config(profile, "apply")) as cluster:
        assert cluster.wait() == 2
        assert "autoplan.profile" in cluster.output
