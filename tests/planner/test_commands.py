"""`diptych simulate` and `diptych plan` on files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from diptych.cluster.cli import app
from diptych.cluster.planner.profile import Parallelism
from diptych.cluster.supervising.config_file import read_config
from typer.testing import CliRunner
from worlds import MODEL, TIMES, profile

PLAN = "prefill: {workers: 1, kv_tokens: 16000}\ndecode: {workers: 1, kv_tokens: 16000}\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("P.json").write_text(profile().model_dump_json())
    Path("plan.yaml").write_text(PLAN)
    rows = [f"{0.1 * i:.1f},{100 + i},{5 + i % 7}" for i in range(60)]
    Path("W.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    return tmp_path


def diptych(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


SIMULATE = ("simulate", "--profile", "P.json", "--plan", "plan.yaml", "--slo", "ttft=0.2s,tpot=0.1s")


def test_simulate_writes_every_request_and_the_summary(files: Path) -> None:
    status, out = diptych(*SIMULATE, "--workload", "W.csv", "--json", "OUT")
    assert status == 0, out
    document = json.loads(Path("OUT").read_text())
    rows = sorted(document["requests"], key=lambda row: row["number"])
    assert [row["arrival_s"] for row in rows[:3]] == [0.0, 0.1, 0.2]
    assert all(row["ttft_s"] > 0 and row["tpot_s"] > 0 and row["met"] for row in rows)
    summary = document["summary"]
    assert summary["attainment"] == {"slo": "ttft=200ms,tpot=100ms", "met": 60, "share": 1.0}
    assert set(summary["times"]) == {"ttft", "tpot", "itl", "handover_gap", "e2e"}
    assert set(summary["workers"]) == {"prefill-0", "decode-0"}
    assert "100.0%" in out


def test_simulate_draws_lengths_and_reads_mixes(files: Path) -> None:
    Path("pairs.json").write_text('{"pairs": [[100, 10], [200, 20]]}')
    status, out = diptych(*SIMULATE, "--lengths", "pairs.json", "--rate", "5", "--requests", "40")
    assert status == 0, out
    Path("mix.json").write_text('{"streams": [{"rate": 4, "prompt": "50", "output": "5"}]}')
    status, out = diptych(*SIMULATE, "--workload", "mix.json", "--requests", "30")
    assert status == 0, out
    assert "30 requests" in out


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"W.csv": "arrival_s,prompt_tokens,output_tokens\n"}, (), "W.csv has no requests"),
        ({"W.csv": "arrival_s,prompt_tokens,output_tokens\n1,5,5\n0,5,5\n"}, (), "W.csv, line 3: arrival_s goes back"),
        ({"W.csv": "arrival_s,prompt_tokens,output_tokens\n1,5,-5\n"}, (), "W.csv, line 2: output_tokens is -5"),
        ({"plan.yaml": PLAN + "model: {name: other}\n"}, (), "The profile is of m, and the plan serves other"),
        ({"plan.yaml": PLAN + "model: {dtype: float32}\n"}, (), "The profile is of bfloat16, and the plan serves float32"),
        ({"plan.yaml": "prefill: {tp: 4}\n"}, (), "prefill.tp: the profile of m on d has no times for tp 4; it has tp 1"),
        ({"plan.yaml": "decode: {kv_tokens: 99999}\n"}, (), "decode.kv_tokens: 99999 tokens of KV do not fit"),
        ({"P.json": "{}"}, (), "P.json is no profile: source"),
        ({}, ("--link", "x"), "The profile has no link 'x'; it has node"),
        ({}, ("--rate", "3"), "W.csv says when its requests come: leave --rate out"),
        ({}, ("--json", "none/OUT"), "none/OUT cannot be written"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_simulated(
    files: Path, change: dict[str, str], arguments: tuple[str, ...], said: str
) -> None:
    for name, text in change.items():
        Path(name).write_text(text)
    status, out = diptych(*SIMULATE, "--workload", "W.csv", *arguments)
    assert status == 2
    assert said in out


WORTH = ("--slo", "ttft=0.2s,tpot=0.06s", "--input", "50-400", "--output", "5-40", "--devices", "2", "--most", "120")


def test_plan_writes_a_file_that_up_and_simulate_take(files: Path) -> None:
    status, out = diptych("plan", "--profile", "P.json", *WORTH, "--out", "best.yaml", "--plot", "front.png")
    assert status == 0, out
    config = read_config(Path("best.yaml"), {})
    assert (config.prefill.workers, config.decode.workers, config.decode.kv_tokens) == (1, 1, 16000)
    assert config.paired, "low affinity"
    assert Path("front.png").read_bytes().startswith(b"\x89PNG")
    assert "1 × prefill (tp 1 pp 1) + 1 × decode (tp 1 pp 1)" in out
    status, out = diptych(*SIMULATE[:3], "--plan", "best.yaml", "--slo", "ttft=0.2s,tpot=0.1s", "--workload", "W.csv")
    assert status == 0, out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--slo", "ttft=10ms,tpot=60ms"),
            "the TTFT limit of 10 ms binds: .* nearest that works is (ttft=[0-9.]+ms,tpot=60ms), with",
        ),
        (
            ("--slo", "ttft=200ms,tpot=1ms"),
            "the TPOT limit of 1 ms binds: .* nearest that works is (ttft=200ms,tpot=[0-9.]+ms), with",
        ),
        (("--slo", "ttft=1ms,tpot=1ms"), "No plan: the TTFT limit of 1 ms and the TPOT limit of 1 ms bind: .* works is (ttft=.+ms), with"),
    ],
)
def test_the_limits_named_as_the_nearest_do_work(files: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out = diptych("plan", "--profile", "P.json", *WORTH, *arguments)
    assert status == 1
    found = re.search(said, out)
    assert found, out
    status, out = diptych("plan", "--profile", "P.json", *WORTH, "--slo", found[1])
    assert status == 0, out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--devices", "1"), "No plan: devices binds, m does not fit twice.* nearest that fits takes 2 devices of 1 × 2: 1 × prefill"),
        (
            ("--rate", "60"),
            "No plan: devices bind, 60 requests/s take more than 2 .* nearest that works takes [4-9] devices: [2-4] × prefill",
        ),
        (("--slo", "ttft=0.2s"), "a plan needs a limit for both"),
    ],
)
def test_no_plan_is_refused_with_what_binds_and_the_nearest_that_works(files: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out = diptych("plan", "--profile", "P.json", *WORTH, *arguments)
    assert status in (1, 2)
    assert re.search(said, out), out


def test_a_model_too_large_for_the_devices_is_refused_with_the_room_it_takes(files: Path) -> None:
    large = profile(model=MODEL.model_copy(update={"weight_bytes": 12e9}), parallelisms=(Parallelism(tp=1, times=TIMES),))
    Path("P.json").write_text(large.model_dump_json())
    status, out = diptych("plan", "--profile", "P.json", *WORTH)
    assert status == 1
    assert re.search(
        "No plan: memory binds, m does not fit twice.* nearest that fits takes 4 devices of 1 × 4: 1 × prefill .tp 1 pp 2", out
    ), out
