"""Placement: who gets what, who is refused, and that no score leaves [0, 1]."""

from dataclasses import replace

import pytest
from diptych.core.errors import ContextExceeded, Unavailable
from diptych.core.fleet import LocalPrefill, Member, Phase, WorkerReport, WorkerState
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.router.budget import BURST, RetryBudget
from diptych.router.placement import (
    Candidate,
    Demand,
    Path,
    Placement,
    Policy,
    Snapshot,
    decode_score,
    place,
    prefill_score,
    unavailable,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUT = Layout("f", (CacheGroup(CacheKind.FULL, (0,), 1, 16, DType.FLOAT32),), 16, (64,))
NEVER, AUTO, ALWAYS = (Policy(how) for how in (LocalPrefill.NEVER, LocalPrefill.AUTO, LocalPrefill.ALWAYS))


def worker(name, *, waiting=0, attempts=0, own=0, tokens=0, alive=True, state=WorkerState.READY, capacity=1000, free=64, layout=LAYOUT):
    phase = Phase.PREFILL if name.startswith("p") else Phase.DECODE
    member = Member(name, f"{name}:1", phase, 1, layout, capacity)
    report = WorkerReport(name, 1, state, waiting, attempts, tokens, free, 64, 0)
    return Candidate(member, report if alive else None, own, 0)


def go(*candidates, policy=AUTO, turn=0, **demand):
    placement = place(Snapshot.of(candidates, turn), Demand(**{"context_tokens": 100, "output_tokens": 10, **demand}), policy)
    names = [member.worker_id if member else None for member in (placement.prefill, placement.decode)]
    return (placement.path, *names)


def test_least_loaded_of_each_phase():
    fleet = [worker("p0", tokens=900), worker("p1", tokens=10), worker("d0", attempts=5), worker("d1", attempts=1), worker("d2", own=3)]
    assert go(*fleet) == (Path.DISAGGREGATED, "p1", "d1")


def test_a_full_pool_counts_as_load():
    assert go(worker("p0"), worker("d0", attempts=2, free=2), worker("d1", attempts=3, free=64))[2] == "d1"


def test_equals_take_turns():
    fleet = [worker("p0"), worker("d0"), worker("d1")]
    assert {go(*fleet, turn=turn)[2] for turn in range(2)} == {"d0", "d1"}


@pytest.mark.parametrize(("policy", "tokens", "path"), [
    (AUTO, 15, Path.LOCAL), (AUTO, 16, Path.DISAGGREGATED), (NEVER, 1, Path.DISAGGREGATED), (ALWAYS, 900, Path.LOCAL),
])  # fmt: skip
def test_who_reads_the_prompt(policy, tokens, path):
    assert go(worker("p0"), worker("d0"), policy=policy, context_tokens=tokens)[0] is path


def test_one_token_is_for_p_alone_unless_all_is_local():
    assert go(worker("p0"), worker("d0"), output_tokens=1) == (Path.PREFILL_ONLY, "p0", None)
    assert go(worker("p0"), worker("d0"), output_tokens=1, policy=ALWAYS) == (Path.LOCAL, None, "d0")
    assert go(worker("p0", alive=False), worker("d0"), output_tokens=1) == (Path.LOCAL, None, "d0")


def test_the_last_attempt_is_local_where_that_is_allowed():
    assert go(worker("p0"), worker("d0"), local=True)[0] is Path.LOCAL
    assert go(worker("p0"), worker("d0"), local=True, policy=NEVER)[0] is Path.DISAGGREGATED


def test_failed_workers_are_avoided_if_there_are_others():
    fleet = [worker("p0"), worker("d0"), worker("d1", attempts=9)]
    assert go(*fleet, avoid=frozenset({"p0", "d0"})) == (Path.DISAGGREGATED, "p0", "d1")


def test_dead_draining_and_too_small_are_passed_over():
    fleet = [worker("p0", alive=False), worker("p1"), worker("d0", state=WorkerState.DRAINING), worker("d1", capacity=105), worker("d2")]
    assert go(*fleet) == (Path.DISAGGREGATED, "p1", "d2")
    assert go(worker("p0", capacity=50), worker("d0")) == (Path.LOCAL, None, "d0")


def test_a_pool_for_all_choices_is_taken_before_an_idle_one_for_fewer():
    fleet = [worker("p0"), worker("d0", capacity=115), worker("d1", capacity=140, attempts=9)]
    assert go(*fleet)[2] == "d0"
    assert go(*fleet, choices=4)[2] == "d1"
    assert go(*fleet, choices=5)[2] == "d0"
    assert go(*fleet, choices=16)[2] == "d0"


def test_only_those_who_can_exchange_kv_are_paired():
    other = replace(LAYOUT, fingerprint="other")
    fleet = [worker("p0"), worker("d0", layout=other), worker("d1", attempts=9)]
    assert go(*fleet) == (Path.DISAGGREGATED, "p0", "d1")
    assert go(worker("p0", layout=other), worker("d0")) == (Path.LOCAL, None, "d0")


@pytest.mark.parametrize(("demand", "field"), [
    ({"context_tokens": 1000}, "prompt"), ({"context_tokens": 995}, "max_tokens"), ({"context_tokens": 600}, "prompt"),
])  # fmt: skip
def test_what_never_fits_is_refused_with_numbers_even_when_nobody_lives(demand, field):
    with pytest.raises(ContextExceeded, match=r"\d+ tokens.*\d+") as refused:
        go(worker("p0", capacity=500, alive=False), worker("d0", alive=False), policy=NEVER, **demand)
    assert refused.value.field == field


@pytest.mark.parametrize("fleet", [[], [worker("d0", alive=False)], [worker("p0")]])
def test_nobody_there(fleet):
    with pytest.raises(Unavailable, match="No decode worker"):
        go(*fleet)
    assert unavailable(Snapshot.of(tuple(fleet)), AUTO)


def test_health():
    assert unavailable(Snapshot.of((worker("d0"),)), AUTO) is None
    assert "never" in unavailable(Snapshot.of((worker("d0"),)), NEVER)
    assert unavailable(Snapshot.of((worker("p0"),)), AUTO)


counts = st.integers(0, 10**6)
candidates = st.builds(
    lambda name, waiting, attempts, own, tokens, alive, free: worker(
        name, waiting=waiting, attempts=attempts, own=own, tokens=tokens, alive=alive, free=free
    ),
    st.sampled_from(["p0", "p1", "d0", "d1"]), counts, counts, counts, counts, st.booleans(), st.integers(0, 64),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(candidates, max_size=6, unique_by=lambda c: c.member.worker_id), st.sampled_from([NEVER, AUTO, ALWAYS]), counts, counts)
def test_scores_and_placements_of_any_fleet(fleet, policy, context, output):
    for candidate in fleet:
        assert 0 <= prefill_score(candidate) <= 1
        assert 0 <= decode_score(candidate) <= 1
    try:
        placement = place(Snapshot.of(tuple(fleet)), Demand(context + 1, output + 1), policy)
    except (Unavailable, ContextExceeded):
        return
    alive = {c.member.worker_id for c in fleet if c.usable}
    chosen = [member for member in (placement.prefill, placement.decode) if member]
    assert {member.worker_id for member in chosen} <= alive
    assert chosen
    assert isinstance(placement, Placement)


def test_retry_budget_is_a_share_of_requests_with_a_floor():
    budget = RetryBudget(0.0)
    assert sum(budget.take(0.0) for _ in range(200)) == BURST
    for _ in range(100):
        budget.accepted()
    assert 18 <= sum(budget.take(0.0) for _ in range(100)) <= 20
    assert sum(budget.take(5.0) for _ in range(100)) in (4, 5)
