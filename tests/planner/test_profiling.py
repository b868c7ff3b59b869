"""What `diptych profile` makes of what it has measured; the measuring itself each night."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, is_dataclass, replace
from pathlib import Path

import pytest
from decoders import LLAMA, card
from diptych.benchmarks.ourselves import Asked, Comparison, Figures, Served, measured, read_served, table, write_served
from diptych.benchmarks.pace import Pace, paced
from diptych.cluster.cli import app
from diptych.cluster.commands import preparing
from diptych.cluster.load.slo import parse_slo
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.latency import step_seconds
from diptych.cluster.planner.plan_file import config_of, policies_for
from diptych.cluster.planner.profile import Link, Parallelism, Residuals, read_profile, slower
from diptych.cluster.planner.shapes import Plan, Sample, Shape
from diptych.cluster.planner.sharing import scaled
from diptych.cluster.profiling import measuring
from diptych.cluster.profiling.grid import AGAIN, ON_CORES, ON_GPUS, ROWS, Place
from diptych.cluster.profiling.making import Crossing, Fitted, of_host
from diptych.cluster.profiling.reckoning import (
    Answers,
    Apart,
    EngineStep,
    Prompt,
    Read,
    Together,
    beside,
    moment_of,
    prompt_seconds,
    request_seconds,
    with_both,
    with_prompts,
    with_serving,
)
from diptych.cluster.profiling.recorded import Ran, steps_of
from diptych.cluster.profiling.served import LEAST_CONTEXT
from diptych.cluster.resources import preflight
from diptych.cluster.spans.taken import Process
from diptych.cluster.supervising.posts import workers
from diptych.core.config import load_config
from diptych.core.errors import ConfigError
from diptych.core.layout import DType
from diptych.core.quantization import Quantization
from diptych.core.recordings import Doing, Recorded, Span
from typer.testing import CliRunner
from worlds import TIMES, profile

SERVED = TIMES.model_copy(update={"step": 0.002, "step_row": 0.0005})


def answers(rows: int, factor: float = 1.0) -> Answers:
    found = Answers(rows, 50 * rows, 0.0)
    return Answers(rows, 50 * rows, step_seconds(scaled(SERVED, factor), found.work))


def prompts(chunk: int | None = None) -> tuple[Prompt, ...]:
    """Of a cluster whose steps have a longer constant than the engine alone."""
    longer = SERVED.model_copy(update={"prefill": SERVED.prefill.model_copy(update={"constant": 0.014})})
    computed = ((tokens, prompt_seconds(longer, tokens, chunk)) for tokens in (64, 160, 256, 352, 448))
    return tuple(Prompt(tokens, 0.007 + seconds, seconds) for tokens, seconds in computed)


def read(rows: int, factor: float) -> Read:
    found = Read(64, 96, rows, 50 * rows, 0.0)
    return Read(64, 96, rows, 50 * rows, step_seconds(scaled(SERVED, factor), found.work))


def test_what_serving_adds_is_found_again() -> None:
    found = with_serving(TIMES, [answers(1), answers(8)], {rows: step_seconds(TIMES, answers(rows).work) for rows in (1, 8)})
    assert (found.step, found.step_row) == pytest.approx((0.002, 0.0005))
    assert request_seconds((*prompts(), *prompts(64))) == pytest.approx(0.007)


def test_nothing_that_serving_adds_is_negative() -> None:
    """On a busy machine a step in a cluster can seem shorter than it was alone."""
    found = with_serving(TIMES, [answers(1), answers(8)], {rows: 1.1 * answers(rows).gap for rows in (1, 8)})
    assert (found.step, found.step_row) == (0.0, 0.0)
    assert request_seconds([Prompt(64, 0.1, 0.2)]) == 0.0
    assert with_both(SERVED, read(4, 0.5)).both == 0.0


@pytest.mark.parametrize("chunk", [None, 64])
def test_what_each_step_of_a_prompt_takes_more_is_found_again(chunk: int | None) -> None:
    found = with_prompts(SERVED, prompts(chunk), chunk)
    assert found.prefill.constant == pytest.approx(0.014)
    *most, last = prompts(chunk)
    disturbed = with_prompts(SERVED, [*most, replace(last, computed=last.computed + 0.3)], chunk)
    assert disturbed.prefill.constant == pytest.approx(0.014)
    shorter = with_prompts(SERVED, [Prompt(64, 0.0, 0.0)], chunk)
    assert shorter.prefill.constant == 0.0


def test_what_each_token_of_a_prompt_takes_more_is_found_again() -> None:
    *most, last = (replace(each, computed=each.computed + 2e-5 * each.tokens) for each in prompts())
    for served in ([*most, last], [*most, replace(last, computed=last.computed + 0.3)]):
        found = with_prompts(SERVED, served, None)
        assert found.prefill.constant == pytest.approx(0.014)
        assert found.prefill.token == pytest.approx(SERVED.prefill.token + 2e-5)


def test_what_a_chunk_beside_answers_takes_more_is_found_again() -> None:
    more = SERVED.model_copy(update={"both": 0.003})
    seen = read(4, 1.0)
    assert with_both(more, Read(64, 96, 4, 200, seen.seconds + 0.001)).both == pytest.approx(0.001)


def test_how_each_phase_slows_the_other_is_found_again() -> None:
    prefill, decode = beside(SERVED, SERVED, seen_beside(1.4, 1.2))
    assert (prefill, decode) == ({2: pytest.approx(1.5), 6: pytest.approx(1.4)}, {2: pytest.approx(1.3), 6: pytest.approx(1.2)})
    assert beside(SERVED, SERVED, seen_beside(0.8, 0.8)) == ({2: 1.0, 6: 1.0}, {2: 1.0, 6: 1.0})


def seen_beside(prefill: float, decode: float) -> Apart:
    """A tenth more beside few answers."""
    factors = (0.1, 2), (0.0, 6)
    prompts = tuple(replace(read(0, prefill + more), rows=rows) for more, rows in factors)
    return Apart((), (), prompts, tuple(answers(rows, decode + more) for more, rows in factors))


def test_what_a_cluster_showed_on_a_slower_machine_is_what_it_shows_on_this_one() -> None:
    """Prompts and answers each by how much longer the engine alone took."""
    first = {
        EngineStep(1, "prefill", 1, 256): 0.2,
        EngineStep(2, "prefill", 1, 256): 0.1,
        EngineStep(1, "decode", 1, 16): 0.04,
        EngineStep(2, "decode", 8, 16): 0.03,
    }
    longer = {"prefill": 1.2, "decode": 1.5}
    before, after = ({step: seconds * (longer[step.what] + more) for step, seconds in first.items()} for more in (-0.1, 0.1))
    moment = moment_of(1, first, before, after)
    assert (moment.prefill, moment.decode) == pytest.approx((1.2, 1.5))
    assert moment.engine == {1: pytest.approx(0.04)}
    disturbed = before | {EngineStep(1, "decode", 1, 16): 0.4, EngineStep(1, "decode", 4, 16): 1.0}
    steps = {**first, EngineStep(1, "decode", 4, 16): 0.05}
    assert moment_of(1, steps, disturbed, disturbed).decode == pytest.approx(10.0), "the median of 10, 1.4 and 20"

    def slow(found: Prompt) -> Prompt:
        return replace(found, ttft=found.ttft * 1.2, computed=found.computed * 1.2)

    here = Apart(prompts(), (answers(1),), (read(2, 1.4),), (answers(6, 1.1),))
    there = Apart(tuple(map(slow, prompts())), (answers(1, 1.5),), (read(2, 1.4 * 1.2),), (answers(6, 1.1 * 1.5),))
    assert flat(there.as_at_first(moment)) == pytest.approx(flat(here))
    one = Together(prompts(64), (answers(1),), read(4, 1.0), 64)
    other = Together(tuple(map(slow, prompts(64))), (answers(1, 1.5),), read(4, 1.2), 64)
    assert flat(other.as_at_first(moment)) == pytest.approx(flat(one))


def test_what_is_timed_again_was_timed_at_first() -> None:
    assert set(AGAIN) <= set(ON_CORES.steps(LEAST_CONTEXT)) & set(ON_GPUS.steps(LEAST_CONTEXT))
    assert {batch for what, batch, _ in AGAIN if what == "decode"} == set(ROWS)


def flat(found: object) -> list[float]:
    """All numbers in it."""
    if isinstance(found, tuple):
        return [number for each in found for number in flat(each)]
    return flat(astuple(found)) if is_dataclass(found) and not isinstance(found, type) else [found]  # type: ignore[list-item]


def test_beside_more_or_fewer_answers_than_were_measured_the_nearest_counts() -> None:
    known = {2: 1.5, 6: 1.1}
    assert [slower(known, rows) for rows in (1, 2, 4, 6, 100, math.inf)] == pytest.approx([1.5, 1.5, 1.3, 1.1, 1.1, 1.1])
    assert slower({}, 3) == 1.0


def test_a_prompt_in_chunks_takes_a_step_for_each() -> None:
    assert prompt_seconds(TIMES, 100, 64) == pytest.approx(prompt_seconds(TIMES, 64) + 0.01 + 36e-4 + 36 * (128 + 36) * 1e-9)


def test_a_step_has_what_its_engine_waited_for_it_unless_it_had_nothing_to_compute() -> None:
    doings = [(Doing.IDLE, 0, 5), (Doing.STEP, 5, 7), (Doing.WAIT, 7, 8), (Doing.STEP, 8, 11), (Doing.IDLE, 11, 20), (Doing.STEP, 20, 21)]
    spans = tuple(Span(doing, 1, began * 10**9, ended * 10**9, 0, who=("a", "b")) for doing, began, ended in doings)
    process = Process("decode-0", "decode", 1, 10**9, 0, Recorded(0, 30, spans, ()))
    assert steps_of(process) == (Ran(2, 4.0, 6.0), Ran(2, 6.0, 10.0), Ran(2, 19.0, 20.0))


def test_a_step_that_is_launched_ends_when_its_output_is_there() -> None:
    """On a GPU: three launches of 1 s each, while steps of 4 s are computed one behind another; then a rest, and one more."""
    launched = [
        (Doing.IDLE, -1, 0, 10),
        (Doing.STEP, 1, 10, 11),
        (Doing.WAIT, -1, 11, 12),
        (Doing.STEP, 2, 12, 13),
        (Doing.STEP, 3, 15, 16),
    ]
    launched += [(Doing.IDLE, -1, 23, 30), (Doing.STEP, 4, 30, 31)]
    outputs = [(Doing.UNDER_WAY, 1, 11, 14), (Doing.UNDER_WAY, 2, 14, 18), (Doing.UNDER_WAY, 3, 18, 22), (Doing.UNDER_WAY, 4, 31, 34)]
    spans = [
        Span(doing, thread, began * 10**9, ended * 10**9, 0, step, ("a",))
        for thread, told in ((1, launched), (2, outputs))
        for doing, step, began, ended in told
    ]
    process = Process("decode-0", "decode", 1, 0, 0, Recorded(0, 40, tuple(spans), ()))
    assert steps_of(process) == (Ran(1, 10, 14), Ran(1, 14, 18), Ran(1, 18, 22), Ran(1, 30, 34))


def test_what_is_planned_for_a_measured_host_fits_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, residuals = 16 << 30, Residuals(points=1, mean=0.0, worst=0.0)
    measured = card(LLAMA, DType.BFLOAT16, 256).model_copy(update={"weights_bytes": 1 << 29, "source": str(tmp_path)})
    fitted = {cores: Fitted(Place((tuple(range(cores)),)), 0, TIMES, residuals, residuals, {}) for cores in (1, 2)}
    crossings = {"shm": Crossing(Link(bytes_per_s=1e9), residuals, 0.001)}
    made = of_host(measured, 2, (1, 1), fitted, (), crossings, None, memory)
    policies = policies_for(made, 1, Sample((Arrival(0, 0.0, 100, 10),)))
    config = load_config(config_of(Plan(Shape(1, 1), Shape(1, 1)), made, policies, made.model.source))
    monkeypatch.setattr(preflight, "available_bytes", lambda: memory)
    preflight.check_memory(config, measured, workers(config, measured, tmp_path, range(2)))
    assert config.decode.max_running == 32, "more were never timed"
    assert config.model.source == str(tmp_path)


def figures(**changes: float) -> Figures:
    return Figures(**{"attainment": 0.9, "goodput": 1.0, "ttft_p50": 0.2, "ttft_p90": 0.4, "tpot_p50": 0.02, "tpot_p90": 0.03} | changes)


@pytest.mark.parametrize(
    ("changes", "around", "missed"),
    [
        ({}, (0.9, 0.9), []),
        ({"attainment": 0.86, "goodput": 1.09, "ttft_p90": 0.45}, (0.9, 0.9), []),
        ({"attainment": 0.8}, (0.9, 0.9), ["attainment"]),
        ({"attainment": 0.8}, (0.95, 0.75), []),
        ({"goodput": 1.2, "tpot_p50": 0.03}, (0.9, 0.9), ["goodput", "tpot_p50"]),
    ],
)
def test_a_figure_beyond_what_is_promised_is_a_miss(changes: dict[str, float], around: tuple[float, float], missed: list[str]) -> None:
    found = Comparison("apart", 1.0, 50, figures(), figures(**changes), [figures(**changes)], around)
    assert [miss.split(": ")[1].split()[0] for miss in found.misses()] == missed
    assert table([found]).count("!") == len(missed)


def test_what_was_served_is_compared_again(tmp_path: Path) -> None:
    loads = [
        Served(
            "apart",
            1.5,
            ((Asked(0.5, 100, 20, 0.5, 0.2, 0.03, 0.8, False), Asked(1.5, 64, 1, 1.6, None, None, 0.1, True)),),
            (Pace(1.1, 0.9),),
        )
    ]
    write_served(tmp_path / "A.json", loads)
    assert read_served(tmp_path / "A.json") == loads
    found = measured(loads[0].runs[0], parse_slo("ttft=1s,tpot=50ms"))
    assert (found.attainment, found.goodput) == pytest.approx((0.5, 1 / 1.2))
    with pytest.raises(SystemExit, match="is not what --answers writes"):
        read_served(tmp_path / "none.json")


def test_a_slower_machine_has_a_slower_profile() -> None:
    """Answers by what reading memory takes, all else by what arithmetic does."""
    known = profile(parallelisms=(Parallelism(tp=1, times=TIMES, by_cores={1: TIMES}, decode_by_cores={2: TIMES}, kv_tokens={1: 16000}),))
    slower = paced(known, Pace(2.0, 1.5))
    (found,) = slower.parallelisms
    for times in (found.times, found.by_cores[1], found.decode_by_cores[2]):
        assert (times.prefill, times.decode) == (scaled(TIMES, 2.0).prefill, scaled(TIMES, 1.5).decode)
        assert times.hop == 2 * TIMES.hop
    assert slower.overheads.request == 2 * known.overheads.request


def diptych(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


def test_a_place_that_is_not_there_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    status, out = diptych("profile", "--out", str(tmp_path / "none" / "P.json"))
    assert status == 2
    assert "cannot be written: there is no directory" in out


def test_a_model_too_short_for_the_clusters_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = card(LLAMA, DType.BFLOAT16, LEAST_CONTEXT - 1)
    monkeypatch.setattr(measuring, "read_card", lambda directory: short)
    with pytest.raises(ConfigError, match="use --no-clusters") as caught:
        measuring.profile_here(tmp_path, gpus=(), tps=(), threads=None, repeats=1, clusters=True, out=tmp_path / "P.json")
    assert caught.value.field == "clusters"


def test_the_weights_are_those_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(preparing, "prepare_here", lambda *values: asked.append(values[-1]) or tmp_path)
    monkeypatch.setattr(measuring, "profile_here", lambda directory, **options: asked.append(directory))
    status, out = diptych("profile", "--quantization", "int8", "--out", str(tmp_path / "P.json"))
    assert (status, asked) == (0, [Quantization.INT8, tmp_path]), out


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_this_machine_is_measured_and_then_simulated(tiny_gemma3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out = diptych(
        "profile", "--model", str(tiny_gemma3_dir), "--dtype", "float32", "--out", "P.json", "--repeats", "1", "--tp", "2"
    )
    assert status == 0, out
    known = read_profile(Path("P.json"))
    assert [each.tp for each in known.parallelisms] == [1, 2]
    assert set(known.links) == {"shm", "gloo"}
    assert known.cores is not None
    assert known.basis["overheads.request"] == "measured"
    Path("plan.yaml").write_text("prefill: {workers: 1}\ndecode: {workers: 1}\nmodel: {dtype: float32}\n")
    Path("W.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,50,5\n1,40,5\n")
    status, out = diptych(
        "simulate", "--profile", "P.json", "--plan", "plan.yaml", "--slo", "ttft=9s,tpot=9s", "--workload", "W.csv", "--json", "OUT"
    )
    assert status == 0, out
    assert json.loads(Path("OUT").read_text())["summary"]["attainment"]["share"] == 1.0
