"""Pairs of workers: KV stays within one while both can take it, and leaves it visibly where they cannot."""

import asyncio
import logging
from itertools import product

import pytest
from diptych.core.fleet import LocalPrefill, Member, Phase, WorkerReport, WorkerState
from diptych.core.generate import Generate
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.sampling import SamplingParams
from diptych.router.placement import Across, Candidate, Demand, Path, Policy, Snapshot, decode_score, place, prefill_score
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUT = Layout("f", (CacheGroup(CacheKind.FULL, (0,), 1, 16, DType.FLOAT32),), 16, (64,))
OTHER = Layout("other", LAYOUT.groups, 16, (64,))
NEVER = Policy(LocalPrefill.NEVER)
PROMPT = 100


def worker(name, *, load=0, free=64, alive=True, state=WorkerState.READY, capacity=1000, layout=LAYOUT):
    """`p3` is the partner of `d3`. `load`: prompt tokens that wait, or choices that are written."""
    phase, partner = (Phase.PREFILL, "d") if name.startswith("p") else (Phase.DECODE, "p")
    member = Member(name, f"{name}:1", phase, 1, layout, capacity, partner + name[1:])
    tokens, running = (load, 0) if phase is Phase.PREFILL else (0, load)
    report = WorkerReport(name, 1, state, 0, running, tokens, free, 64, 0)
    return Candidate(member, report if alive else None)


def go(*candidates, turn=0, policy=NEVER, **demand):
    placement = place(Snapshot.of(candidates, turn), Demand(**{"context_tokens": PROMPT, "output_tokens": 10, **demand}), policy)
    names = [member and member.worker_id for member in (placement.prefill, placement.decode)]
    return (*names, placement.across)


def test_both_of_the_pair_that_has_least_to_do():
    assert go(worker("p0", load=900), worker("p1"), worker("d0"), worker("d1", load=1)) == ("p1", "d1", None)
    assert go(worker("p0"), worker("p1"), worker("d0", load=9, free=9), worker("d1", load=1)) == ("p1", "d1", None)
    assert {go(worker("p0"), worker("p1"), worker("d0"), worker("d1"), turn=turn)[0] for turn in range(2)} == {"p0", "p1"}


@pytest.mark.parametrize(("partner", "why"), [
    ({"alive": False}, Across.GONE), ({"state": WorkerState.DRAINING}, Across.GONE), ({"free": 6}, Across.FULL),
    ({"capacity": 105}, Across.FULL), ({"layout": OTHER}, Across.UNLIKE),
])  # fmt: skip
def test_a_partner_that_cannot_take_it(partner, why):
    assert go(worker("p0"), worker("d0", **partner), worker("d1", load=30)) == ("p0", "d1", why)
    assert go(worker("p0"), worker("p1", load=500), worker("d0", **partner), worker("d1")) == ("p1", "d1", None), "a pair comes first"
    assert go(worker("p0"), worker("p1", load=9000), worker("d0", **partner), worker("d1")) == (
        ("p1", "d1", None) if why is Across.UNLIKE else ("p0", "d1", why)
    ), "but not at any price"


def test_a_partner_that_is_no_member_any_more():
    assert go(worker("p0"), worker("d1")) == ("p0", "d1", Across.GONE)


def test_a_worker_on_which_the_request_failed_is_avoided():
    fleet = [worker("p0"), worker("p1"), worker("d0"), worker("d1", load=9)]
    assert go(*fleet, avoid=frozenset({"d0"})) == ("p1", "d1", None)
    assert go(fleet[0], *fleet[2:], avoid=frozenset({"d0"})) == ("p0", "d1", Across.FAILED)
    assert go(*fleet[::2], avoid=frozenset({"p0", "d0"})) == ("p0", "d0", None), "if there are others"


def test_where_all_are_full_kv_waits_within_its_pair():
    assert go(worker("p0", load=600), worker("p1"), worker("d0", load=9, free=5), worker("d1", load=9, free=1)) == ("p1", "d1", None)


def test_what_moves_no_kv_goes_to_whom_it_would():
    fleet = [worker("p0", load=9), worker("p1"), worker("d0"), worker("d1", load=3)]
    assert go(*fleet, output_tokens=1) == ("p1", None, None)
    assert go(*fleet, context_tokens=5, policy=Policy()) == (None, "d0", None)


workers = st.builds(
    lambda name, load, free, alive, draining: worker(
        name, load=load, free=free, alive=alive, state=WorkerState.DRAINING if draining else WorkerState.READY
    ),
    st.sampled_from([f"{side}{number}" for side in "pd" for number in range(4)]), st.integers(0, 2000), st.integers(0, 64),
    st.booleans(), st.sampled_from([True, False, False, False]),
)  # fmt: skip
fleets = st.lists(workers, min_size=2, max_size=8, unique_by=lambda c: c.member.worker_id)


def best(fleet, avoid):
    """The slow twin: the largest score of every two that may be taken, and of those within a pair."""
    fresh = {
        phase: [c for c in side if c.member.worker_id not in avoid] or side
        for phase in Phase
        for side in [[c for c in fleet if c.usable and c.member.phase is phase]]
    }
    prefills, decodes = fresh[Phase.PREFILL], fresh[Phase.DECODE]
    roomy = [c for c in decodes if c.report.blocks_free * 16 >= PROMPT] or decodes
    names = {c.member.worker_id for c in roomy}
    inside, across = 0.0, 0.0
    for p, d in product(prefills, roomy):
        score = prefill_score(p) * decode_score(d)
        if p.member.partner == d.member.worker_id:
            inside = max(inside, score)
        elif p.member.partner not in names:
            across = max(across, score)
    return inside, across


@settings(max_examples=100, deadline=None)
@given(fleets, st.sets(st.sampled_from(["p0", "d0", "d1"])), st.integers(0, 9))
def test_any_fleet_is_served_as_the_slow_twin_says(fleet, avoid, turn):
    by_name = {c.member.worker_id: c for c in fleet}
    inside, across = best(fleet, avoid)
    if not inside and not across:
        return
    p, d, why = go(*fleet, avoid=frozenset(avoid), turn=turn)
    score = prefill_score(by_name[p]) * decode_score(by_name[d])
    if inside >= 0.5 * across:
        assert (d, why) == (by_name[p].member.partner, None)
        assert score == inside
    else:
        assert why is not None
        assert d != by_name[p].member.partner


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 1000), st.integers(7, 64)), min_size=1, max_size=6), st.integers(0, 9))
def test_whole_pairs_never_share_kv(loads, turn):
    fleet = [
        c
        for i, (prompts, choices, free) in enumerate(loads)
        for c in (worker(f"p{i}", load=prompts), worker(f"d{i}", load=choices, free=free))
    ]
    p, d, why = go(*fleet, turn=turn)
    assert (p[1:], why) == (d[1:], None)


def test_the_router_keeps_kv_within_pairs_and_says_when_it_cannot(site, caplog):
    async def ask(service):
        chunks = [chunk async for chunk in service.generate(Generate("x" * 20, sampling=SamplingParams(max_tokens=8)))]
        timing = chunks[-1].finish.timing
        return timing.prefill_worker, timing.decode_worker

    async def check():
        async with site(prefill=2, decode=2, policy=NEVER) as s:
            for i in range(2):
                s.workers[f"p{i}"].partner, s.workers[f"d{i}"].partner = f"d{i}", f"p{i}"
            await s.publish()
            assert s.router.fleet.describe()[0].members[0].partner == "d0", "it is published"
            went = await asyncio.gather(*(ask(s.router.service) for _ in range(12)))
            assert set(went) == {("p0", "d0"), ("p1", "d1")}
            assert ("diptych_attempts_across_total", "gone") not in s.recorder.values
            await s.workers.pop("p0").kill()
            await s.workers.pop("d1").kill()
            await s.publish()
            with caplog.at_level(logging.INFO, logger="diptych.router.run"):
                assert await ask(s.router.service) == ("p1", "d0")
            assert s.recorder.values["diptych_attempts_across_total", "gone"] == 1
            assert Path.DISAGGREGATED in {key[1] for key in s.recorder.values if key[0] == "diptych_attempts_total"}
            (said,) = [record for record in caplog.records if record.getMessage() == "KV leaves its pair"]
            assert (said.fields["partner"], said.fields["why"]) == ("d1", "gone")

    asyncio.run(check())
