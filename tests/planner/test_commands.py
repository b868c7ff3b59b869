"""`diptych simulate` and `diptych plan` on files."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from diptych.cluster.cli import app
from diptych.cluster.commands import planning, simulating
from diptych.cluster.commands.devices import Asked
from diptych.cluster.planner.profile import DeviceShare, Parallelism
from diptych.cluster.planner.site import Space
from diptych.cluster.supervising.config_file import read_config
from typer.testing import CliRunner
from worlds import MODEL, TIMES, profile

PLAN = "prefill: {workers: 1, kv_tokens: 16000}\ndecode: {workers: 1, kv_tokens: 16000}\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (planning, simulating):
        monkeypatch.setattr(module._out, "width", 200)  # that of the first test in this process that has set COLUMNS, otherwise
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
    rows = document["requests"]
    assert [row["number"] for row in rows] == list(range(60)), "in the order in which they came"
    ended = [row["ended_s"] for row in rows]
    assert ended != sorted(ended), "and not in that of their ends"
    assert [row["arrival_s"] for row in rows[:3]] == [0.0, 0.1, 0.2]
    assert all(row["ttft_s"] > 0 and row["tpot_s"] > 0 and row["met"] for row in rows)
    summary = document["summary"]
    assert summary["attainment"] == {"slo": "ttft=200ms,tpot=100ms", "met": 60, "share": 1.0}
    assert set(summary["times"]) == {"ttft", "tpot", "itl", "handover_gap", "e2e"}
    assert set(summary["workers"]) == {"prefill-0", "decode-0"}
    for course in summary["workers"].values():
        line = course["utilisation_over_time"]
        assert 0 < max(line["mean"]) <= 1
        assert sum(line["mean"]) * line["every_s"] == pytest.approx(course["utilisation"] * summary["seconds"], abs=0.01)
    assert "100.0%" in out


def test_simulate_draws_lengths_and_reads_mixes(files: Path) -> None:
    Path("pairs.json").write_text('{"pairs": [[100, 10], [200, 20]]}')
    status, out = diptych(*SIMULATE, "--lengths", "pairs.json", "--rate", "5", "--requests", "40")
    assert status == 0, out
    Path("mix.json").write_text('{"streams": [{"rate": 4, "prompt": "50", "output": "5"}]}')
    status, out = diptych(*SIMULATE, "--workload", "mix.json", "--requests", "30")
    assert status == 0, out
    assert "30 requests" in out


def wrong(*, parallelisms: int = 1, **changes: dict[str, object]) -> str:
    """A profile's text with other values in some of its parts."""
    values = json.loads(profile().model_dump_json())
    values["parallelisms"] *= parallelisms
    return json.dumps(values | {part: values[part] | change for part, change in changes.items()})


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"W.csv": "arrival_s,prompt_tokens,output_tokens\n"}, (), "W.csv has no requests"),
        ({"W.csv": "arrival_s,prompt_tokens,output_tokens\n1,5,5\n0,5,5\n"}, (), "W.csv, line 3: arrival_s goes back"),
        ({"W.csv": "arrival_s,prompt_tokens,output_tokens\n1,5,-5\n"}, (), "W.csv, line 2: output_tokens is -5"),
        ({"plan.yaml": PLAN + "model: {name: other}\n"}, (), "The profile is of m, and the plan serves other"),
        ({"plan.yaml": PLAN + "model: {dtype: float32}\n"}, (), "The profile is of bfloat16, and the plan serves float32"),
        ({"plan.yaml": PLAN + "model: {source: google/gemma-3-1b}\n"}, (), "the profile is of m, and the plan serves google/gemma-3-1b"),
        ({"plan.yaml": PLAN + "model: {kv_dtype: int8}\n"}, (), "the profile is of KV in bfloat16, and the plan holds it in int8"),
        ({"P.json": wrong(model={"dtype": "float16"})}, (), "which is what it serves unless model.dtype says float16"),
        ({"P.json": wrong(model={"dtype": "fp16"})}, (), "model.dtype: 'fp16' is none of bfloat16, float16, float32"),
        ({"P.json": wrong(links={"node": {"bytes_per_s": math.inf}})}, (), "links.node.bytes_per_s: Input should be a finite number"),
        ({"P.json": wrong(parallelisms=2)}, (), "P.json is no profile: parallelisms: two are of tp 1"),
        ({"P.json": '{"slos": []}'}, (), "docs/replaying.md says how one is written by hand"),
        ({"plan.yaml": "prefill: {pp: 300}\n"}, (), "prefill.pp: 300 stages of the 10 layers of m"),
        ({"plan.yaml": "prefill: {tp: 4}\n"}, (), "prefill.tp: the profile of m on d has no times for tp 4; it has tp 1"),
        ({"plan.yaml": "decode: {kv_tokens: 99999}\n"}, (), "decode.kv_tokens: 99999 tokens of KV do not fit"),
        ({"P.json": "{}"}, (), "P.json is no profile: source"),
        ({}, ("--link", "x"), "The profile has no link 'x'; it has node"),
        ({}, ("--rate", "3"), "W.csv says when its requests come: leave --rate out"),
        ({}, ("--json", "none/OUT"), "none/OUT cannot be written"),
        ({}, ("--json", "W.csv"), "--json: W.csv is read too and would be overwritten"),
        ({}, ("--json", "plan.yaml"), "--json: plan.yaml is read too and would be overwritten"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_simulated(
    files: Path, change: dict[str, str], arguments: tuple[str, ...], said: str
) -> None:
    for name, text in change.items():
        Path(name).write_text(text)
    before = Path("W.csv").read_bytes()
    status, out = diptych(*SIMULATE, "--workload", "W.csv", *arguments)
    assert status == 2
    assert said in out
    assert Path("W.csv").read_bytes() == before


def test_a_prompt_beyond_any_context_takes_no_memory_and_failed_calls_are_told(files: Path) -> None:
    Path("W.csv").write_text("Timestamp,Request tokens,Response tokens\n3,5,0\n5,900000000,5\n6,100,5\n")
    status, out = diptych(*SIMULATE, "--workload", "W.csv")
    assert status == 0, out
    assert "W.csv: 1 row has no answer, the first in line 2: left out" in out
    assert out.count("left out") == 1
    assert "2 requests in" in out
    assert "refused, 1 such" in out


def test_why_requests_are_refused_is_said_once_for_those_alike(files: Path) -> None:
    Path("W.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,2048,5\n2,3000,5\n3,100,5\n")
    status, out = diptych(*SIMULATE, "--workload", "W.csv", "--json", "OUT")
    assert status == 0, out
    refusals = json.loads(Path("OUT").read_text())["summary"]["refusals"]
    assert list(refusals.values()) == [2]
    assert f"refused, 2 such: {next(iter(refusals))}" in out


WORTH = ("--slo", "ttft=0.2s,tpot=0.06s", "--input", "50-400", "--output", "5-40", "--devices", "2", "--most", "120")


def test_plan_writes_a_file_that_up_and_simulate_take(files: Path) -> None:
    status, out = diptych("plan", "--profile", "P.json", *WORTH, "--out", "best.yaml", "--plot", "front.png")
    assert status == 0, out
    config = read_config(Path("best.yaml"), {})
    assert (config.prefill.workers, config.decode.workers, config.decode.kv_tokens) == (1, 1, 16000)
    assert config.paired, "low affinity"
    assert config.model.source == "m", "not the demo model under another's name"
    assert "The profile does not say where the model is (model.source)" in Path("best.yaml").read_text()
    assert Path("front.png").read_bytes().startswith(b"\x89PNG")
    assert "1 × prefill (tp 1 pp 1) + 1 × decode (tp 1 pp 1)" in out
    assert config.device == "cuda", "on a Ray cluster that is joined auto would be the CPU"
    assert out.rstrip().endswith("best.yaml: diptych up -f best.yaml"), "one node"
    status, out = diptych("plan", "--profile", "P.json", *WORTH, "--nodes", "2", "--out", "two.yaml")
    assert "two.yaml: diptych up -f two.yaml --address RAY" in out, out
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
        (("--input", "2000-2100", "--output", "50"), r"\d+% of the requests are longer than the context of m, 2048 tokens \(the longest"),
        (("--out", "none/best.yaml"), "--out: none/best.yaml cannot be written: there is no directory none"),
        (("--plot", "none/x.png"), "--plot: none/x.png cannot be written: there is no directory none"),
        (("--plot", "x.gif"), "--plot: x.gif ends with none of .png"),
        (("--out", "P.json"), "--out: P.json is read too"),
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


def test_a_model_too_large_for_any_number_of_them_is_refused_with_what_its_weights_take(files: Path) -> None:
    large = profile(model=MODEL.model_copy(update={"weight_bytes": 3e12}), parallelisms=(Parallelism(tp=1, times=TIMES),))
    Path("P.json").write_text(large.model_dump_json())
    status, out = diptych("plan", "--profile", "P.json", *WORTH)
    assert status == 1
    assert "its weights are 3000 GB and a d has 10, so it takes 668 for the weights of both phases" in out


def on(name: str, prefill: float, decode: float, **changes: object) -> str:
    """The profile of a device with such seconds of a prompt's token and of a decode step, as a file's text."""
    times = TIMES.model_copy(
        update={
            "prefill": TIMES.prefill.model_copy(update={"token": prefill}),
            "decode": TIMES.decode.model_copy(update={"constant": decode}),
        }
    )
    values = {"device": DeviceShare(name=name, memory_bytes=10e9), "parallelisms": (Parallelism(tp=1, times=times, kv_tokens={1: 16000}),)}
    return profile(**(values | changes)).model_dump_json()


MIXED = ("plan", "--profile", "A.json", "--profile", "B.json", *WORTH, "--devices", "1", "--affinity", "high")


@pytest.fixture
def kinds(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "processes", nullcontext)  # here: two processes that import all take longer than the search
    Path("A.json").write_text(on("A", 1e-4, 0.07, model=MODEL.model_copy(update={"source": "/m"})))
    Path("B.json").write_text(on("B", 9e-4, 0.02))


def test_a_plan_for_two_kinds_of_device_is_written_and_simulated(kinds: None) -> None:
    status, out = diptych(*MIXED, "--device", "a,cost=3", "--device", "B,cost=2", "--output", "2-4", "--most", "60", "--out", "best.yaml")
    assert status == 0, out
    assert re.search(r"best \* +1 × prefill \(tp 1 pp 1 on A\) \+ 1 × decode \(tp 1 pp 1 on B\) +1 × A and 1 × B .* 5 ", out), out
    assert "per cost of one B" in out
    assert "best.yaml: diptych up -f best.yaml --address RAY" in out
    config = read_config(Path("best.yaml"), {})
    assert config.model.source == "/m"
    assert (config.prefill.accelerator, config.decode.accelerator, config.device, config.paired) == ("A", "B", "cuda", False)
    simulate = ("simulate", "--plan", "best.yaml", "--slo", "ttft=0.2s,tpot=0.06s", "--workload", "W.csv")
    status, out = diptych(*simulate, "--profile", "B.json", "--profile", "A.json", "--json", "OUT")
    assert status == 0, out
    assert json.loads(Path("OUT").read_text())["summary"]["times"]["tpot"]["mean"] < 0.03, "decoded on B"
    status, out = diptych(*simulate, "--profile", "A.json")
    assert status == 2
    assert "decode.accelerator: nothing is known of B" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "A", "--device", "H1000"), "--device: nothing is known of H1000.* one of A, B.* some of A100, .*Did you mean H100?"),
        (("--device", "A", "--device", "A"), "--device: two are of A"),
        (("--device", "A,node=2"), "--device A,node=2: 'node' is no part of it. Did you mean nodes. It is NAME"),
        (("--device", "A,nodes=0"), "--device A,nodes=0: nodes is '0'; it is a whole number above 0"),
        (("--device", "A,cost=x"), "--device A,cost=x: cost is 'x'; it is a number above 0"),
        (("--device", "A=A.json"), "it begins with the name of a kind of device"),
        (("--device", "A,cost=2", "--device", "B"), "--device: A has a cost and B has none"),
        (("--cost", "2"), "--cost is of one kind of device"),
        (("--profile", "A.json"), "--profile: two are of A"),
        (("--profile", "C.json"), "all must be of one model.*model.dtype is bfloat16 in that of A, and float16 in that of C"),
        (("--profile", "cpu.json"), "one of A and cpu is a CPU; KV moves between GPUs, or between CPUs"),
        (
            ("--affinity", "low"),
            "No plan: devices binds, m does not fit twice.* on 1 × A and 1 × B. The nearest that fits takes 2 × A of 1 × 2 A",
        ),
        pytest.param(
            ("--rate", "60"),
            r"60 requests/s take more than 1 × A and 1 × B .* nearest that works takes [0-9]+ × A and [0-9]+ × B: ",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_what_is_wrong_with_devices_is_refused_by_name(kinds: None, arguments: tuple[str, ...], said: str) -> None:
    Path("C.json").write_text(on("C", 1e-4, 0.02, model=MODEL.model_copy(update={"dtype": "float16"})))
    Path("cpu.json").write_text(on("cpu", 1e-4, 0.02))
    status, out = diptych(*MIXED, *arguments)
    assert status in (1, 2)
    assert re.search(said, " ".join(out.split())), out


def test_a_device_without_a_profile_is_taken_from_its_data_sheet(kinds: None) -> None:
    site = Asked((Path("A.json"),), ("l40s,nodes=2,devices=4", "A"), Space(3, 5)).site()
    assert [(kind.name, kind.space, kind.profile.estimate) for kind in site.kinds] == [
        ("L40S", Space(2, 4), True),
        ("A", Space(3, 5), False),
    ]
    assert site.kinds[0].profile.model == site.kinds[1].profile.model
    assert site.kinds[0].away == site.kinds[0].profile.links["network"]
    Path("cpu.json").write_text(on("cpu", 1e-4, 0.02))
    two = Asked((Path("cpu.json"),), ("H100", "L40S"), Space(1, 8)).site()
    assert [kind.name for kind in two.kinds] == ["H100", "L40S"], "of a profile of another device only the model is taken"
