"""The latency model, what is fitted to it and what is derived from it."""

from __future__ import annotations

import json
import random

import pytest
from diptych.cluster.planner.agenda import GRID
from diptych.cluster.planner.data_sheets import DEVICES, device_of, estimate
from diptych.cluster.planner.extrapolating import extended, law
from diptych.cluster.planner.fitting import BothPoint, DecodePoint, PrefillPoint, fit, fit_decode, fit_decodes, fit_prefill, fit_steps
from diptych.cluster.planner.latency import DecodeTimes, Pace, StepTimes, Work, step_seconds
from diptych.cluster.planner.profile import Model, parse_profile
from diptych.cluster.planner.sharing import scaled
from diptych.core.errors import ConfigError
from worlds import TIMES, profile


@pytest.mark.parametrize("stages", [1, 3])
def test_many_rounds_take_to_the_last_bit_what_single_ones_do(stages: int) -> None:
    many = Pace.of(TIMES, 7, stages).rounds(5000)
    ends = [0.0]
    for i in range(40):
        ends.append(ends[-1] + Pace.of(TIMES, 7, stages).rounds(5000 + 7 * i).first)
    assert [many.seconds(count) for count in range(41)] == ends
    assert [many.begun(ends[i] - GRID, 40) for i in range(1, 41)] == [*range(1, 41)]
    assert [many.begun(end, 40) for end in ends] == [*range(1, 41), 40], "the next has begun when one ends"
    assert many.begun(1e9, 40) == 40
    if stages == 1:
        assert many.seconds(40) == pytest.approx(sum(step_seconds(TIMES, Work(rows=7, context=5000 + 7 * i)) for i in range(40)))


def test_a_large_batch_has_times_of_its_own() -> None:
    times = StepTimes(prefill=TIMES.prefill, decode=TIMES.decode, decode_large=DecodeTimes(constant=1, context=0, row=0), large_from=10)
    assert step_seconds(times, Work(rows=9, context=9)) < 0.1
    assert step_seconds(times, Work(rows=10, context=10)) == 1


def test_a_chunk_beside_decodes_reads_the_weights_once() -> None:
    both = step_seconds(TIMES, Work(tokens=100, pairs=10000, rows=5, context=500))
    apart = step_seconds(TIMES, Work(tokens=100, pairs=10000)) + step_seconds(TIMES, Work(rows=5, context=500))
    assert both == pytest.approx(apart - TIMES.prefill.constant)


def test_fitting_finds_the_terms_again_in_spite_of_noise() -> None:
    draw = random.Random(1)
    grid = [(batch, length) for batch in (1, 4, 16) for length in (16, 128, 512, 1500)]
    points = [PrefillPoint(b, n, step_seconds(TIMES, Work(tokens=b * n, pairs=b * n * n)) * draw.uniform(0.97, 1.03)) for b, n in grid]
    times, residuals = fit_prefill(points)
    assert times.token == pytest.approx(TIMES.prefill.token, rel=0.05)
    assert times.constant == pytest.approx(TIMES.prefill.constant, rel=0.05)
    assert residuals.worst < 0.05
    decode, _ = fit_decode([DecodePoint(b, n, step_seconds(TIMES, Work(rows=b, context=b * n))) for b, n in grid])
    assert (decode.constant, decode.context, decode.row) == pytest.approx((0.02, 1e-6, 1e-4), rel=1e-6)


def test_decode_times_are_fitted_in_two_pieces_where_large_batches_have_others() -> None:
    small, large = TIMES.decode, DecodeTimes(constant=0.005, context=1e-6, row=0.002)
    grid = [(batch, context) for batch in (1, 4, 8, 9, 16, 32) for context in (16, 256)]
    points = [
        DecodePoint(b, n, step_seconds(TIMES.model_copy(update={"decode": small if b < 9 else large}), Work(rows=b, context=b * n)))
        for b, n in grid
    ]
    found = fit_decodes(points)
    assert found[2] == 9
    assert found[0].row == pytest.approx(small.row)
    assert found[1] is not None
    assert found[1].row == pytest.approx(large.row)
    assert found[3].worst < 1e-6
    alike = [DecodePoint(b, n, step_seconds(TIMES, Work(rows=b, context=b * n))) for b, n in grid]
    assert fit_decodes(alike)[1] is None, "one piece is enough"


def test_what_a_chunk_beside_decodes_takes_more_is_fitted() -> None:
    more = TIMES.model_copy(update={"both": 0.008, "hop": 0.0})
    prefills = [PrefillPoint(1, n, step_seconds(TIMES, Work(tokens=n, pairs=n * n))) for n in (16, 64, 256, 1024)]
    decodes = [DecodePoint(b, n, step_seconds(TIMES, Work(rows=b, context=b * n))) for b in (1, 2, 4, 8) for n in (64, 640)]
    both = [BothPoint(b, 64, 64, 128, step_seconds(more, Work(tokens=64, pairs=64 * 320, rows=b, context=64 * b))) for b in (1, 4)]
    times, _, _ = fit_steps(prefills, decodes, both)
    assert times.both == pytest.approx(0.008, rel=0.01)
    assert times.both_row == pytest.approx(TIMES.decode.row, rel=0.01)
    assert step_seconds(times, Work(rows=1, context=64)) == pytest.approx(decodes[0].seconds, rel=0.01), "alone it takes no more"


def test_a_sequence_beside_a_chunk_may_cost_less_than_in_a_large_batch_of_its_own() -> None:
    """There the weights are read for the chunk in any case; what a large batch's `row` has of reading them is not paid again."""
    large = TIMES.model_copy(update={"decode_large": DecodeTimes(constant=0.0, context=0.0, row=0.003), "large_from": 16, "hop": 0.0})
    measured = large.model_copy(update={"both": 0.004, "both_row": 0.001})
    prefills = [PrefillPoint(1, n, step_seconds(TIMES, Work(tokens=n, pairs=n * n))) for n in (16, 64, 256, 1024)]
    decodes = [DecodePoint(b, n, step_seconds(large, Work(rows=b, context=b * n))) for b in (1, 4, 8, 16, 32) for n in (16, 256)]

    def work(rows: int) -> Work:
        return Work(tokens=64, pairs=64 * 320, rows=rows, context=256 * rows)

    times, _, _ = fit_steps(prefills, decodes, [BothPoint(b, 256, 64, 128, step_seconds(measured, work(b))) for b in (1, 4, 8, 16)])
    assert times.decode_large is not None
    for rows in (1, 12, 16, 32):
        assert step_seconds(times, work(rows)) == pytest.approx(step_seconds(measured, work(rows)), rel=0.01)
    slower = scaled(times, 2.0)
    assert step_seconds(slower, work(16)) == pytest.approx(2 * step_seconds(times, work(16)))


def test_no_term_is_negative_and_short_steps_count_as_much_as_long_ones() -> None:
    (constant, slope), _ = fit([(1.0, 1.0), (1.0, 10.0), (1.0, 1000.0)], [1.0, 0.9, 0.8])
    assert constant > 0
    assert slope == 0
    terms, residuals = fit([(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)], [0.001, 100.001, 100.0])
    assert terms == pytest.approx((0.001, 100.0))
    assert residuals.worst < 1e-6


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 measured steps are too few"):
        fit_prefill([PrefillPoint(1, 1, 1.0)] * 2)


def test_derived_times_follow_the_law_of_those_measured() -> None:
    assert law([1, 2, 4], [8 + 1, 4 + 1, 2 + 1]) == pytest.approx((8, 1))
    assert law([2], [3.0]) == (6.0, 0.0)
    one = profile().parallelisms[0]
    full = extended(profile(), [1, 2])
    derived = full.parallelism(2)
    assert derived is not None
    assert derived.error > 0
    assert derived.times.prefill.token == pytest.approx(one.times.prefill.token / 2)
    assert full.parallelism(1) == one, "what was measured stays"


@pytest.mark.parametrize("name", DEVICES)
def test_a_data_sheet_gives_a_profile_that_says_it_is_an_estimate(name: str) -> None:
    model = Model(name="m", dtype="bfloat16", layers=32, heads=32, kv_heads=8, max_context=8192, kv_token_bytes=131072, weight_bytes=16e9)
    made = estimate(model, device_of(name.lower()))
    assert made.estimate
    assert [each.tp for each in made.parallelisms] == [1, 2, 4, 8]
    tokens = [step_seconds(each.times, Work(tokens=2048, pairs=2048**2)) for each in made.parallelisms]
    assert tokens == sorted(tokens, reverse=True), "more shards are faster"
    assert parse_profile(made.model_dump_json(), "p") == made


def test_an_unknown_device_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"no data sheet of 'V100'; there are A100, H100, H200, B200, L40S"):
        device_of("V100")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"version": 2}, "version"), ({"parallelisms": []}, "parallelisms"), ({"model": {}}, "model.name"), ({"x": 1}, "x")],
)
def test_a_wrong_profile_is_refused_by_key(change: dict[str, object], named: str) -> None:
    text = json.dumps(json.loads(profile().model_dump_json()) | change)
    with pytest.raises(ConfigError, match=f"P.json is no profile: {named}: "):
        parse_profile(text, "P.json")
