"""The search for the goodput, against servers whose attainment at each rate is known."""

from __future__ import annotations

import random

from diptych.cluster.load.goodput import FIRST_LOOK, Probe, Search, Tally, Trial, Verdict
from diptych.cluster.load.table import goodput_sentence
from hypothesis import given, settings
from hypothesis import strategies as st


def exact(rate: float, met: bool) -> Probe:
    return Probe(rate, int(met), 1, 0.0, 1.0, Verdict.MET if met else Verdict.MISSED)


@given(st.floats(0.1, 500), st.floats(0.1, 500), st.sampled_from([0.02, 0.05, 0.25]))
def test_a_search_closes_in_on_a_sharp_limit(limit: float, start: float, tolerance: float) -> None:
    search = Search(0.9, start, tolerance)
    while (rate := search.next_rate()) is not None:
        search.add(exact(rate, rate <= limit))
        assert len(search.probes) < 40
    found = search.found()
    assert found.complete
    assert found.rate == found.proven
    assert found.rate is not None
    assert found.refuted is not None
    assert found.rate <= limit < found.refuted <= found.rate * (1 + tolerance)


def test_a_search_ends_where_nothing_or_everything_meets() -> None:
    for met in (True, False):
        search = Search(0.9, 1.0, floor=0.1, ceiling=30.0)
        while (rate := search.next_rate()) is not None:
            search.add(exact(rate, met))
        found = search.found()
        assert (found.proven, found.refuted) == ((16.0, None) if met else (None, 0.125))


def test_a_probe_that_contradicts_an_earlier_one_does_not_loop() -> None:
    search = Search(0.9, 4.0)
    for rate, met in ((4.0, True), (8.0, True), (16.0, False), (12.0, False), (10.0, False), (9.0, False)):
        search.add(exact(rate, met))
    assert search.next_rate() == 8.5
    search.add(exact(7.0, False))  # below one that was met
    assert search.next_rate() == 5.5
    assert search.found().rate == 4.0


@given(st.integers(0, 500), st.sampled_from([30, 31, 60, 100, 480, 1000]), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_looks_double_up_to_the_most_and_share_the_risk(met: int, most: int, confidence: float) -> None:
    trial = Trial.growing(0.9, confidence, most)
    assert trial.looks[0] == FIRST_LOOK
    assert trial.most == most
    assert all(late <= 2 * early for early, late in zip(trial.looks, trial.looks[1:], strict=False))
    single = Trial(0.9, confidence, (most,))
    low, high = trial.interval(min(met, most), most)
    inner_low, inner_high = single.interval(min(met, most), most)
    assert low <= inner_low <= inner_high <= high


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([0.8, 0.95]))
def test_a_trial_is_wrong_no_more_often_than_it_says(seed: int, confidence: float) -> None:
    """At a share a little beside the target, where deciding wrongly is likeliest. 200 trials; the bound is 4 deviations wide."""
    draw = random.Random(seed)
    trial = Trial.growing(0.9, confidence, 240)
    wrong = 0
    for _ in range(200):
        met = [draw.random() < 0.89 for _ in range(trial.most)]
        verdicts = [trial.judge(sum(met[:look]), look) for look in trial.looks]
        decided = next((verdict for verdict in verdicts if verdict is not Verdict.OPEN), None)
        wrong += decided is Verdict.MET
    risk = 1 - confidence
    assert wrong / 200 <= risk + 4 * (risk * (1 - risk) / 200) ** 0.5


@given(st.lists(st.booleans(), max_size=60), st.randoms(), st.lists(st.integers(1, 70), max_size=5).map(sorted))
def test_a_tally_counts_only_what_every_earlier_request_has_ended_before(met: list[bool], order: random.Random, looks: list[int]) -> None:
    tally, ended = Tally(), set[int]()
    numbers = list(range(len(met)))
    order.shuffle(numbers)
    for number in numbers:
        tally.add(number, met[number])
        ended.add(number)
        prefix = next(i for i in range(len(met) + 1) if i not in ended)
        for look in looks:
            assert tally.advance(look) == (prefix >= look if look >= tally.total else False)
            assert tally.total <= prefix
            assert tally.met == sum(met[: tally.total])


def test_noisy_probes_find_a_rate_near_the_true_one() -> None:
    """Attainment falls from 1 by 2 % for each request/s: 90 % is at 5. The rate found should attain 85 % to 95 %."""
    for seed in range(20):
        draw = random.Random(seed)
        trial, search = Trial.growing(0.9, 0.95, 480), Search(0.9, 1.0)
        while (rate := search.next_rate()) is not None:
            tally = Tally()
            verdict = Verdict.OPEN
            for look in trial.looks:
                for number in range(tally.total, look):
                    tally.add(number, draw.random() < 1 - 0.02 * rate)
                assert tally.advance(look)
                if (verdict := trial.judge(tally.met, tally.total)) is not Verdict.OPEN:
                    break
            search.add(Probe(rate, tally.met, tally.total, *trial.interval(tally.met, tally.total), verdict))
        found = search.found()
        assert found.rate is not None
        assert 2.5 <= found.rate <= 7.5
        assert found.proven is None or found.proven <= 5.5
        assert "90% meeting the SLO" in goodput_sentence(found, 0.9, 0.95)
