"""A workload from a recorded log: what is drawn from it again is like it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from statistics import fmean

import pytest
from diptych.cluster.cli import app
from diptych.cluster.load.fitting import MOST_PAIRS, fit
from diptych.cluster.load.mix import Mix, Stream, parse_mix
from diptych.core.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

PAIRS = ((100, 10), (200, 20), (300, 5, 160))


def recorded(rate: float, burstiness: float, seed: int, count: int = 2000) -> list:  # type: ignore[type-arg]
    return list(islice(Mix(streams=(Stream(rate=rate, burstiness=burstiness, pairs=PAIRS),)).arrivals(rate, seed), count))


@settings(max_examples=8, deadline=None)
@given(st.floats(0.4, 5.0), st.floats(0.5, 50.0), st.integers(0, 1000))
def test_rate_and_burstiness_are_found_again(burstiness: float, rate: float, seed: int) -> None:
    found = fit([recorded(rate, burstiness, seed)])
    assert found.burstiness == pytest.approx(burstiness, rel=0.35)
    assert abs(found.rate / rate - 1) < 5 * found.rate_error
    assert found.hits == pytest.approx(160 / 600, rel=0.01)


def test_what_is_drawn_again_has_the_lengths_and_the_cached_prefixes() -> None:
    mix = parse_mix(fit([recorded(4.0, 1.0, 1)]).mix.model_dump_json(exclude_defaults=True), "W.json")
    again = list(islice(mix.arrivals(mix.rate, 7), 2000))
    assert mix.rate == pytest.approx(4.0, rel=0.1)
    assert {(each.prompt_tokens, each.output_tokens, each.prefix_tokens) for each in again} == {(100, 10, 0), (200, 20, 0), (300, 5, 160)}
    assert fmean(each.prompt_tokens for each in again) == pytest.approx(200, rel=0.01)
    assert len({each.prefix for each in again if each.prefix_tokens}) == 1


def test_a_long_log_is_drawn_from_and_several_logs_are_one() -> None:
    one, other = recorded(5.0, 1.0, 1, 3000), recorded(5.0, 1.0, 2, 3000)
    found = fit([one, other])
    assert len(found.lengths) == MOST_PAIRS
    assert found.requests == 6000
    assert found.rate == pytest.approx(5.0, rel=0.1)


def diptych(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [f"{each.at:.4f},{each.prompt_tokens},{each.output_tokens},1,{each.prefix_tokens},0.1," for each in recorded(4.0, 0.5, 3, 400)]
    Path("log.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens,prefix,prefix_tokens,ttft_s,tpot_s", *rows]))
    return tmp_path


def test_the_command_writes_a_workload_and_says_what_it_is(here: Path) -> None:
    status, out = diptych("workload", "fit", "log.csv", "-o", "W.json")
    assert status == 0, out
    assert "400 requests" in out
    assert "in bursts" in out
    (stream,) = json.loads(Path("W.json").read_text())["streams"]
    assert stream["rate"] == pytest.approx(4.0, rel=0.3)
    assert len(stream["pairs"]) == 400


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no requests"),
        ("arrival_s,prompt_tokens,output_tokens\n0,10,5\n", "1 requests"),
        ("arrival_s,prompt_tokens,output_tokens\n1,10,5\n0,10,5\n", "line 3"),
        ("arrival_s,prompt_tokens,output_tokens\n" + "1,10,5\n" * 30, "all come at once"),
    ],
)
def test_what_is_no_log_is_refused_and_nothing_written(here: Path, text: str, why: str) -> None:
    Path("bad.csv").write_text(text)
    status, out = diptych("workload", "fit", "bad.csv", "-o", "W.json")
    assert status == 2
    assert why in out
    assert not Path("W.json").exists()


def test_a_workload_needs_its_ending_and_a_log_to_be_there(here: Path) -> None:
    status, out = diptych("workload", "fit", "log.csv", "-o", "W.yaml")
    assert (status, ".json" in out) == (2, True)
    status, out = diptych("workload", "fit", "none.csv", "-o", "W.json")
    assert (status, "none.csv" in out) == (2, True)


@pytest.mark.parametrize("pair", ["[10, 0]", "[10, 5, 11]", "[10, 5, -1]", "[10]"])
def test_lengths_of_a_mix_that_cannot_be_are_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="pairs"):
        parse_mix(f'{{"streams": [{{"rate": 1, "pairs": [{pair}]}}]}}', "W.json")
