"""Pairs of workers: what a config may say of them, which nodes they go to, who comes and goes with whom."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import Start, fleets, scaled, wait_for, write_card
from diptych.cluster.on_ray import room
from diptych.cluster.on_ray.nodes import Asked, Need, Node, Wanted, equal_part, fit, no_room, seat
from diptych.cluster.on_ray.room import Room
from diptych.cluster.supervising.headcount import Change, pair_changes
from diptych.cluster.supervising.posts import workers
from diptych.core.config import Placing, load_config
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from diptych.core.model import read_card
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.sets(st.integers(0, 5))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prefill": {"workers": 3}, "decode": {"workers": 2}}, "there are 3 prefill and 2 decode workers"),
        ({"prefill": {"workers": 0}}, "there are 0 prefill and 1 decode workers"),
        (
            {"prefill": {"workers": 3}, "decode": {"groups": [{"workers": 2, "tp": 2}, {"workers": 1}]}},
            "there are 3 prefill and 2 + 1 decode workers",
        ),
    ],
)
def test_there_are_as_many_workers_of_both_phases(config: dict[str, Any], said: str) -> None:
    load_config(config)
    with pytest.raises(ConfigError, match=f"^paired: {said.replace('+', '.')}") as refused:
        load_config({"paired": True, **config})
    assert refused.value.field == "paired"


def test_a_load_that_changes_makes_pairs_join_or_leave_and_no_worker_change_its_role() -> None:
    plan = {"mode": "propose", "profile": "P.json", "slo": "ttft=1s,tpot=1s"}
    with pytest.raises(ConfigError, match=r"keep their roles. Name autoplan\.most_workers"):
        load_config({"paired": True, "autoplan": plan})
    assert load_config({"paired": True, "autoplan": {**plan, "most_workers": 4}}).paired


def test_workers_of_one_number_are_partners(tmp_path: Path) -> None:
    model = write_card(tmp_path / "model")
    sides = {phase: {"groups": [{"workers": 2}, {"tp": 2}]} for phase in ("prefill", "decode")}
    for paired in (True, False):
        found = workers(load_config({"paired": paired, **sides}), read_card(model), model, range(8))
        names = [f"{phase}-{number}" for phase in ("decode", "prefill") for number in range(3)]
        assert [worker.partner for worker in found] == (names if paired else [None] * 6)


@given(NUMBERS, NUMBERS, st.integers(0, 6))
def test_after_a_change_there_are_so_many_pairs_and_no_half_of_one(prefills: set[int], decodes: set[int], wanted: int) -> None:
    present = {Phase.PREFILL: [prefills], Phase.DECODE: [decodes]}
    after = {}
    for phase, (change,) in pair_changes(present, {Phase.DECODE: [wanted]}).items():
        after[phase] = (present[phase][0] | set(change.join)) - set(change.leave)
    assert after[Phase.PREFILL] == after[Phase.DECODE]
    assert len(after[Phase.DECODE]) == wanted


def test_who_has_lost_its_partner_gets_it_back_before_others_come() -> None:
    found = pair_changes({Phase.PREFILL: [{0, 2}], Phase.DECODE: [{0, 1, 2}]}, {Phase.DECODE: [4]})
    assert found == {Phase.PREFILL: [Change((1, 3), ())], Phase.DECODE: [Change((3,), ())]}


# -- which nodes -----------------------------------------------------------------------------------------------------------


def nodes(*cpus: float) -> list[Node]:
    return [Node(f"n{index}", f"10.0.0.{index}", free, 100) for index, free in enumerate(cpus)]


def pair(prefill: int, decode: int, stages: tuple[int, int] = (1, 1)) -> list[Wanted[Need]]:
    return [Wanted(phase, [Need(1, 0)] * ranks, cuts) for phase, ranks, cuts in zip(Phase, (prefill, decode), stages, strict=True)]


def ids(chosen: list[list[Node]] | None) -> list[list[str]] | None:
    return None if chosen is None else [[node.node_id for node in places] for places in chosen]


@pytest.mark.parametrize("placing", Placing)
def test_a_pair_shares_a_node_or_has_none(placing: Placing) -> None:
    assert ids(seat(nodes(1, 2, 1), pair(1, 1), placing)) == [["n1"], ["n1"]]
    assert seat(nodes(1, 1), pair(1, 1), placing) is None, "never silently apart"
    assert seat(nodes(3, 3), pair(2, 2), placing) is None


def test_pairs_are_packed_or_spread_like_workers() -> None:
    two = [pair(1, 1), pair(1, 1)]
    assert [ids(places) for places in fit(nodes(4, 4), two, Placing.PACK) or []] == [[["n0"], ["n0"]]] * 2
    assert [ids(places) for places in fit(nodes(4, 4), two, Placing.SPREAD) or []] == [[["n0"], ["n0"]], [["n1"], ["n1"]]]
    assert fit(nodes(3, 1), two, Placing.PACK) is None


def test_a_pair_larger_than_a_node_is_cut_at_the_stages_of_both() -> None:
    """The first half of the layers of both on one node, the second on another: each layer's KV stays."""
    assert ids(seat(nodes(4, 4), pair(4, 2, (2, 2)), Placing.PACK)) == [["n0", "n0", "n1", "n1"], ["n0", "n1"]]
    assert ids(seat(nodes(4, 4), pair(4, 4, (4, 2)), Placing.PACK)) == [["n0"] * 2 + ["n1"] * 2] * 2
    assert ids(seat(nodes(8, 4), pair(4, 4, (4, 2)), Placing.PACK)) == [["n0"] * 4] * 2, "one node if there is one"
    assert seat(nodes(4, 4), pair(4, 4, (4, 1)), Placing.PACK) is None
    assert seat(nodes(4, 4), pair(3, 2, (3, 2)), Placing.PACK) is None


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from(Placing))
def test_no_node_is_given_more_than_it_has_and_parts_find_room_if_there_is_any(
    free: list[int], stages: int, prefill: int, decode: int, placing: Placing
) -> None:
    chosen = seat(nodes(*free), pair(stages * prefill, stages * decode, (stages, stages)), placing)
    parts = next(
        (
            parts
            for parts in range(1, stages + 1)
            if stages % parts == 0 and sum(cpus // ((prefill + decode) * stages // parts) for cpus in free) >= parts
        ),
        None,
    )
    assert (chosen is None) == (parts is None)
    if chosen is None or parts is None:
        return
    taken = [node.node_id for places in chosen for node in places]
    assert all(taken.count(node.node_id) <= node.cpus for node in nodes(*free))
    for part in range(parts):
        sides = [set(map(id_of, places[part * len(places) // parts : (part + 1) * len(places) // parts])) for places in chosen]
        assert sides[0] == sides[1]
        assert len(sides[0]) == 1


def id_of(node: Node) -> str:
    return node.node_id


def test_who_names_no_threads_gets_as_many_as_pairs_leave() -> None:
    asked = [[Wanted(phase, [Asked(None, 0)]) for phase in Phase]] * 2
    assert equal_part(nodes(6, 6), asked, Placing.PACK) == 3
    assert equal_part(nodes(8, 3), asked, Placing.PACK) == 2
    apart = [[worker] for together in asked for worker in together]
    assert equal_part(nodes(6, 3), apart, Placing.PACK) == 2, "where pairs have room for one thread each"
    assert equal_part(nodes(6, 3), asked, Placing.PACK) == 1


def test_a_pair_without_a_node_is_told_what_is_missing() -> None:
    both = dict(zip(("prefill-1", "decode-1"), pair(2, 1), strict=True))
    assert no_room(both, nodes(2, 1)) == (
        "No node of the Ray cluster has 3 CPUs and 0.0 GiB free for prefill-1 and decode-1, which are a pair (free are 10.0.0.0: 2 CPUs, "
        "0.0 GiB; 10.0.0.1: 1 CPUs, 0.0 GiB)."
    )
    apart = [replace(node, roles=frozenset({f"diptych-{phase}"})) for node, phase in zip(nodes(8, 8), Phase, strict=True)]
    assert no_room(both, apart) == (
        "No node of the Ray cluster is for workers of both phases, as a pair needs (10.0.0.0: diptych-prefill; 10.0.0.1: diptych-decode). "
        'Start one with `ray start --address … --resources \'{"diptych-prefill": 1, "diptych-decode": 1}\'`.'
    )
    together = [replace(node, roles=node.roles | {"diptych-decode"}) for node in apart]
    assert ids(seat(together, pair(1, 1), Placing.SPREAD)) == [["n0"], ["n0"]]


# -- reservations ----------------------------------------------------------------------------------------------------------


@dataclass
class FakeRay:
    """Nodes `10.0.0.<i>`, and groups that hold what was asked of them, as far as it fits."""

    cpus: list[float]
    dead: set[int] = field(default_factory=set)
    groups: dict[int, tuple[list[dict[str, float]], list[int]]] = field(default_factory=dict)
    made: int = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"n{i}", "NodeManagerAddress": f"10.0.0.{i}", "Alive": i not in self.dead, "Resources": {"CPU": cpus}}
            for i, cpus in enumerate(self.cpus)
        ]

    def free(self) -> dict[str, dict[str, float]]:
        left = list(self.cpus)
        for bundles, there in self.groups.values():
            for bundle, node in zip(bundles, there, strict=True):
                left[node] -= bundle["CPU"]
        return {f"n{i}": {"CPU": left[i], "memory": 1e9} for i in range(len(self.cpus)) if i not in self.dead}

    def group(self, bundles: list[dict[str, float]], strategy: str) -> FakeGroup:
        self.made += 1
        pinned = [next((int(name[-1]) for name in bundle if name.startswith("node:")), None) for bundle in bundles]
        if None not in pinned:
            self.groups[self.made] = (bundles, [node for node in pinned if node is not None])
        return FakeGroup(self, self.made)


@dataclass(frozen=True)
class FakeGroup:
    ray: FakeRay
    number: int

    def wait(self, seconds: float) -> bool:
        return self.number in self.ray.groups


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay([2, 2])
    monkeypatch.setattr(room, "_every_node", fake.nodes)
    monkeypatch.setattr(room, "_free", fake.free)
    monkeypatch.setattr(room, "placement_group", fake.group)
    monkeypatch.setattr(room, "remove_placement_group", lambda group: fake.groups.pop(group.number, None))
    monkeypatch.setattr(
        room, "placement_group_table", lambda g: {"bundles_to_node_id": {i: f"n{n}" for i, n in enumerate(fake.groups[g.number][1])}}
    )
    return fake


def asked(number: int) -> Mapping[str, Wanted[Asked]]:
    return {f"{phase}-{number}": Wanted(phase, [Asked(1, 0)]) for phase in Phase}


def rooms(numbers: Sequence[int]) -> Room:
    return Room([list(asked(number).values()) for number in numbers], Placing.PACK, wait_s=0)


def test_both_of_a_pair_are_reserved_at_once_and_either_may_come_and_go(ray: FakeRay) -> None:
    async def check() -> None:
        site = rooms([0, 1])
        first = {name: await site.reserve(name, asked(number)) for number in (0, 1) for name in asked(number)}
        assert len(ray.groups) == 2
        assert [place.seats[0].node_id for place in first.values()] == ["n0", "n0", "n1", "n1"]
        assert [place.strategy(0).placement_group_bundle_index for place in first.values()] == [0, 1, 0, 1]
        with pytest.raises(ConfigError, match="for prefill-2 and decode-2, which are a pair"):
            await site.reserve("prefill-2", asked(2))
        first["decode-0"].give_back()
        with pytest.raises(ConfigError, match=r"free are 10\.0\.0\.0: 0 CPUs"):
            await site.reserve("prefill-2", asked(2))
        again = await site.reserve("decode-0", asked(0))
        assert again.reserved is first["prefill-0"].reserved, "its place was kept"
        again.give_back()
        first["prefill-0"].give_back()
        assert len(ray.groups) == 1, "nobody of it is left"
        assert (await site.reserve("prefill-2", asked(2))).seats[0].node_id == "n0"

    asyncio.run(check())


def test_a_pair_moves_together_from_a_node_that_died(ray: FakeRay) -> None:
    async def check() -> None:
        site = rooms([0])
        prefill, decode = [await site.reserve(name, asked(0)) for name in asked(0)]
        ray.dead.add(0)
        prefill.give_back()  # its end is known first
        moved = await site.reserve("prefill-0", asked(0))
        assert moved.seats[0].node_id == "n1", "not to the seat kept on the dead one"
        decode.give_back()
        there = await site.reserve("decode-0", asked(0))
        assert there.reserved is moved.reserved
        assert len(ray.groups) == 1

    asyncio.run(check())


# -- a cluster of fake programs --------------------------------------------------------------------------------------------


def test_pairs_are_published_join_and_leave_together(start: Start, orders: Path) -> None:
    with start(paired=True) as cluster:
        cluster.expect("Ctrl-C ends it.")
        with pytest.raises(ConfigError, match="paired: there are 1 prefill and 2 decode workers") as refused:
            scaled(cluster, {Phase.DECODE: (2,)})
        assert refused.value.field == "paired"
        scaled(cluster, {Phase.PREFILL: (2,), Phase.DECODE: (2,)})
        assert set(fleets(orders)[-1][1]) == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        scaled(cluster, {Phase.PREFILL: (1,), Phase.DECODE: (1,)})
        wait_for("the fleet", lambda: set(fleets(orders)[-1][1]) == {"prefill-0", "decode-0"})
        assert cluster.end() == 0
