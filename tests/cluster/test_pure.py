"""The small pure parts: sharing cores, restart delays, posts, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cluster_harness import write_card
from diptych.cluster.on_ray.nodes import Asked, Need, Node, Wanted, choose, equal_part, fit, for_phase, free_run, no_room, role_needed
from diptych.cluster.process.spec import RankSpec
from diptych.cluster.programs import rank
from diptych.cluster.programs.on_node import own_cores
from diptych.cluster.resources.cores import Share, share_cores, shares_for_newcomer
from diptych.cluster.resources.memory import available_bytes
from diptych.cluster.supervising.headcount import Change, changes
from diptych.cluster.supervising.posts import newcomers, route_spec, workers
from diptych.cluster.supervising.restarts import RestartBudget
from diptych.cluster.supervising.timeline import TimeLine
from diptych.core.config import Placing, load_config
from diptych.core.fleet import Phase
from diptych.core.model import read_card
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cpu", {}, {"CUDA_VISIBLE_DEVICES": ""}),
        ("cuda", {}, {"CUDA_VISIBLE_DEVICES": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}),
        (
            "cuda",
            {"NCCL_MULTI_RANK_GPU_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            {"CUDA_VISIBLE_DEVICES": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        ),
    ],
)
def test_a_rank_sees_its_gpu_alone_and_may_share_it(
    device: str, before: dict[str, str], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank.os, "environ", before)
    values = {"worker_id": "d", "phase": Phase.DECODE, "model_dir": "/", "device": device, "gpu": "1" if device == "cuda" else None}
    rank.take_device(RankSpec.model_validate(values))
    assert before == after


@pytest.mark.parametrize(
    ("cores", "wanted", "shares"),
    [
        ([0, 1], [None, None], [Share(1, (0,)), Share(1, (1,))]),
        ([0, 1], [None], [Share(2, (0, 1))]),
        ([0, 1], [None, None, None], [Share(1, None)] * 3),
        ([0, 1], [2, None], [Share(2, None), Share(1, None)]),
        ([4, 5, 6, 7], [3, None], [Share(3, (4, 5, 6)), Share(1, (7,))]),
        ([0, 1, 2, 3, 4], [None, None], [Share(3, (0, 1, 2)), Share(2, (3, 4))]),
    ],
)
def test_workers_get_cores_of_their_own_while_there_are_enough(cores: list[int], wanted: list[int | None], shares: list[Share]) -> None:
    assert share_cores(cores, wanted) == shares


@given(st.integers(1, 16), st.lists(st.none() | st.integers(1, 8), min_size=1, max_size=8))
def test_shares_never_overlap_and_keep_what_was_asked(cores: int, wanted: list[int | None]) -> None:
    shares = share_cores(range(cores), wanted)
    assert [share.threads for share, asked in zip(shares, wanted, strict=True) if asked] == [asked for asked in wanted if asked]
    assert all(share.threads >= 1 for share in shares)
    if sum(share.threads for share in shares) <= cores:
        taken = [cpu for share in shares for cpu in share.cpus or ()]
        assert len(taken) == len(set(taken)) == sum(share.threads for share in shares)
    else:
        assert {share.cpus for share in shares} == {None}


@pytest.mark.parametrize(
    ("others", "wanted", "share"),
    [
        ([Share(1, (0,)), Share(1, (1,))], None, Share(2, (2, 3))),
        ([Share(1, (0,)), Share(1, (2,))], 1, Share(1, (1,))),
        ([Share(1, (0,)), Share(1, (1,))], 3, Share(3, None)),
        ([Share(2, (0, 1)), Share(2, (2, 3))], None, Share(1, None)),
        ([Share(1, None)], None, Share(4, None)),
    ],
)
def test_a_newcomer_gets_cores_that_nobody_has(others: list[Share], wanted: int | None, share: Share) -> None:
    assert shares_for_newcomer([0, 1, 2, 3], others, [wanted]) == [share]


def test_the_ranks_of_a_newcomer_share_the_cores_that_nobody_has() -> None:
    assert shares_for_newcomer(range(5), [Share(1, (0,))], [None, None]) == [Share(2, (1, 2)), Share(2, (3, 4))]
    assert shares_for_newcomer(range(2), [Share(1, (0,))], [None, None]) == [Share(1, None), Share(1, None)]


def test_newcomers_leave_each_other_their_cores(tmp_path: Path) -> None:
    config = load_config({"prefill": {"threads": 1}, "decode": {"threads": 1}})
    model = write_card(tmp_path / "model")
    present = workers(config, read_card(model), model, range(4))
    names = [(Phase.PREFILL, 0, 1), (Phase.DECODE, 0, 4), (Phase.DECODE, 0, 5)]
    joining = newcomers(config, read_card(model), model, range(4), present, names)
    assert [(worker.name, worker.ranks[0].cpus) for worker in joining] == [("prefill-1", (2,)), ("decode-4", (3,)), ("decode-5", None)]


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        ([0], 3, Change((1, 2), ())),
        ([0, 1, 2], 1, Change((), (2, 1))),
        ([0, 2], 3, Change((1,), ())),
        ([1, 4], 0, Change((), (4, 1))),
        ([], 1, Change((0,), ())),
        ([0, 1], 2, Change((), ())),
    ],
)
def test_the_highest_leave_and_the_lowest_free_join(present: list[int], wanted: int, expected: Change) -> None:
    assert changes([present], [wanted]) == [expected]


def test_groups_take_their_numbers_from_one_row() -> None:
    assert changes([[0, 1], [2]], [3, 3]) == [Change((3,), ()), Change((4, 5), ())]
    assert changes([[0, 1], [2, 4]], [0, 3]) == [Change((), (1, 0)), Change((3,), ())]


@given(st.lists(st.sets(st.integers(0, 9)), max_size=3), st.data())
def test_afterwards_each_group_has_as_many_as_asked_and_no_number_twice(groups: list[set[int]], data: st.DataObject) -> None:
    present = [numbers - set().union(*groups[:at]) for at, numbers in enumerate(groups)]
    wanted = [data.draw(st.integers(0, 6)) for _ in present]
    after = [(numbers | set(change.join)) - set(change.leave) for numbers, change in zip(present, changes(present, wanted), strict=True)]
    assert [len(numbers) for numbers in after] == wanted
    assert sum(wanted) == len(set().union(*after))


def nodes(*cpus: float) -> list[Node]:
    return [Node(f"n{index}", f"10.0.0.{index}", free, 100) for index, free in enumerate(cpus)]


def decoding(workers: list[list[Need]]) -> list[list[Wanted[Need]]]:
    return [[Wanted(Phase.DECODE, ranks)] for ranks in workers]


def where(places: list[list[list[Node]]] | None) -> list[str]:
    """Of workers with one rank each."""
    return [node.node_id for ((node,),) in places or []]


def test_packing_fills_a_node_and_spreading_takes_the_emptiest() -> None:
    four = decoding([[Need(1, 0)]] * 4)
    assert where(fit(nodes(4, 4), four, Placing.PACK)) == ["n0"] * 4
    assert where(fit(nodes(4, 4), four, Placing.SPREAD)) == ["n0", "n1", "n0", "n1"]


def test_a_worker_goes_where_its_threads_and_memory_are_free() -> None:
    small = Node("small", "10.0.0.9", 8, 10)
    assert choose([small, *nodes(2, 3)], [Need(3, 50)], Placing.PACK) == [nodes(2, 3)[1]]
    assert choose([small, *nodes(2, 2)], [Need(3, 50)], Placing.PACK) is None
    assert fit(nodes(1, 1), decoding([[Need(1, 60)], [Need(1, 60)]]), Placing.PACK) is not None
    assert fit(nodes(2), decoding([[Need(1, 60)], [Need(1, 60)]]), Placing.PACK) is None


@pytest.mark.parametrize(
    ("free", "ranks", "expected"),
    [
        ([1, 4, 2], 3, ["n1"] * 3),
        ([2, 1, 2], 3, ["n0", "n0", "n2"]),
        ([2, 3, 2], 5, ["n1", "n1", "n1", "n0", "n0"]),
        ([1, 1, 1], 3, ["n0", "n1", "n2"]),
        ([1, 1, 1], 4, None),
    ],
)
@pytest.mark.parametrize("placing", Placing)
def test_the_ranks_of_a_worker_share_a_node_or_as_few_as_can_be(
    free: list[float], ranks: int, expected: list[str] | None, placing: Placing
) -> None:
    chosen = choose(nodes(*free), [Need(1, 0)] * ranks, placing)
    assert (None if chosen is None else [node.node_id for node in chosen]) == expected


@pytest.mark.parametrize(
    ("free", "wanted", "threads"),
    [
        ([4], [[None], [None]], 2),
        ([4, 4], [[None], [None]], 4),
        ([4, 2], [[None], [None], [2]], 2),
        ([1], [[None]] * 3, 1),
        ([4, 4], [[None, None], [None, None]], 2),
        ([6, 2], [[None] * 4], 2),
    ],
)
def test_ranks_that_name_no_threads_share_what_the_nodes_have(free: list[float], wanted: list[list[int | None]], threads: int) -> None:
    asked = [[Wanted(Phase.DECODE, [Asked(threads, 0) for threads in ranks])] for ranks in wanted]
    assert equal_part(nodes(*free), asked, Placing.PACK) == threads


def test_a_rank_goes_where_a_gpu_is_free_or_a_part_of_one() -> None:
    site = [replace(node, gpus=count) for node, count in zip(nodes(8, 8), (1.0, 2.0), strict=True)]
    assert where(fit(site, decoding([[Need(1, 0, 1.0)]] * 3), Placing.PACK)) == ["n0", "n1", "n1"]
    assert fit(site, decoding([[Need(1, 0, 1.0)]] * 4), Placing.PACK) is None
    assert where(fit(site, decoding([[Need(1, 0, 0.5)]] * 6), Placing.PACK)) == ["n0"] * 2 + ["n1"] * 4
    assert (
        "has 1 CPU, 1 GPU and 0.0 GiB free for d (free are 10.0.0.0: 8 CPUs, 0.0 GiB, 1 GPUs; 10.0.0.1: 8 CPUs, 0.0 GiB, 2 GPUs)"
        in no_room({"d": Wanted(Phase.DECODE, [Need(1, 0, 1.0)])}, site)
    )


def in_roles(*roles: str) -> list[Node]:
    """A node for each text: its roles, without what they begin with."""
    return [
        replace(node, roles=frozenset(f"diptych-{name}" for name in named.split()))
        for node, named in zip(nodes(*[4] * len(roles)), roles, strict=True)
    ]


@pytest.mark.parametrize(
    ("roles", "prefill", "decode"),
    [
        (["", ""], [0, 1], [0, 1]),
        (["prefill", "decode"], [0], [1]),
        (["router", "prefill decode", ""], [1], [1]),
        (["router", "decode", "decode"], [], [1, 2]),
        (["router prefill", "decode"], [0], [1]),
    ],
)
def test_a_worker_goes_to_nodes_of_its_phase_where_nodes_have_roles(roles: list[str], prefill: list[int], decode: list[int]) -> None:
    site = in_roles(*roles)
    for phase, expected in ((Phase.PREFILL, prefill), (Phase.DECODE, decode)):
        assert for_phase(site, phase) == [site[index] for index in expected]
        assert role_needed(site, phase) == (f"diptych-{phase}" if any(roles) else None)
    both = fit(site, [[Wanted(phase, [Need(4, 0)])] for phase in Phase], Placing.PACK)
    assert (both is None) == (not prefill or len({*prefill, *decode}) < 2)


def test_who_has_no_node_is_told_what_is_missing() -> None:
    site = in_roles("router", "decode", "")
    assert no_room({"prefill-0": Wanted(Phase.PREFILL, [Need(1, 0)])}, site) == (
        "No node of the Ray cluster is for prefill workers (10.0.0.0: diptych-router; 10.0.0.1: diptych-decode). Start one with "
        "`ray start --address … --resources '{\"diptych-prefill\": 1}'`."
    )
    assert no_room({"decode-0": Wanted(Phase.DECODE, [Need(8, 1 << 30)])}, site) == (
        "No node of the Ray cluster with diptych-decode has 8 CPUs and 1.0 GiB free for decode-0 (free are 10.0.0.1: 4 CPUs, 0.0 GiB)."
    )
    assert "the Ray cluster has 1 CPU and 0.0 GiB free for each of the 2 ranks of decode-0" in no_room(
        {"decode-0": Wanted(Phase.DECODE, [Need(1, 0), Need(1, 0)])}, []
    )


NEEDS = st.builds(Need, st.integers(1, 4), st.sampled_from([1, 30, 60]))


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.lists(st.lists(NEEDS, min_size=1, max_size=4), max_size=5),
    st.sampled_from(Placing),
)
def test_no_node_is_given_more_than_it_has(free: list[int], wanted: list[list[Need]], placing: Placing) -> None:
    chosen = fit(nodes(*free), decoding(wanted), placing)
    given = [
        (node.node_id, need)
        for (places,), ranks in zip(chosen or [], wanted, strict=bool(chosen))
        for node, need in zip(places, ranks, strict=True)
    ]
    for node in nodes(*free):
        assert sum(need.threads for there, need in given if there == node.node_id) <= node.cpus
        assert sum(need.memory for there, need in given if there == node.node_id) <= node.memory


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), NEEDS, st.integers(1, 6), st.sampled_from(Placing))
def test_equal_ranks_find_room_if_there_is_any_and_one_node_if_one_has_it(
    free: list[int], need: Need, count: int, placing: Placing
) -> None:
    room = sorted((node.room_for([need] * count) for node in nodes(*free)), reverse=True)
    chosen = choose(nodes(*free), [need] * count, placing)
    fewest = next((used for used in range(1, len(room) + 1) if sum(room[:used]) >= count), None)
    assert (None if chosen is None else len({node.node_id for node in chosen})) == fewest


def test_cores_of_a_node_are_given_once() -> None:
    assert free_run(4, [], 2) == range(2)
    assert free_run(4, [range(2, 4)], 2) == range(2)
    assert free_run(4, [range(2), range(3, 4)], 1) == range(2, 3)
    assert free_run(4, [range(1, 3)], 2) is None
    assert own_cores([4, 5, 6], "1:2") == (5, 6)
    assert own_cores([4, 5, 6], "2:2") is None
    assert own_cores([4, 5, 6], None) is None


def test_restarts_wait_longer_each_time_and_are_given_up() -> None:
    budget = RestartBudget(most=4, window_s=100, first_s=1, cap_s=3)
    assert [budget.delay(now) for now in (0.0, 10.0, 20.0, 30.0, 40.0)] == [1, 2, 3, 3, None]


def test_a_process_that_ran_long_begins_anew() -> None:
    budget = RestartBudget(most=2, window_s=100, first_s=1)
    assert [budget.delay(now) for now in (0.0, 50.0, 101.0, 300.0)] == [1, 2, 2, 1]


def test_specs_follow_the_config(tmp_path: Path) -> None:
    config = load_config(
        {
            "prefill": {"workers": 1, "kv_tokens": 512, "chunk_tokens": 32},
            "decode": {"workers": 2, "kv_tokens": 1024, "max_running": 7, "chunk_tokens": 48},
            "transfer": {"lease_s": 3},
            "router": {"http_port": 0, "limits": {"running": 9}},
            "log": {"level": "debug"},
        }
    )
    model = write_card(tmp_path / "model")
    found = workers(config, read_card(model), model, range(3))
    specs = [worker.ranks[0] for worker in found]
    assert [(worker.name, worker.phase, worker.section, len(worker.ranks)) for worker in found] == [
        ("prefill-0", Phase.PREFILL, "prefill", 1),
        ("decode-0", Phase.DECODE, "decode", 1),
        ("decode-1", Phase.DECODE, "decode", 1),
    ]
    assert [spec.cpus for spec in specs] == [(0,), (1,), (2,)]
    assert [(spec.kv_tokens, spec.chunk_tokens) for spec in specs] == [(512, 32), (1024, 48), (1024, 48)]
    assert {(spec.max_running, spec.lease_s, spec.log_level) for spec in specs} == {(7, 3.0, "debug")}
    route = route_spec(config, tmp_path)
    assert (route.http_port, route.grpc_port, route.limits.running) == (0, 50051, 9)


GROUPS = {
    "prefill": {"tp": 2, "pp": 2, "threads": 1},
    "decode": {"kv_tokens": 1024, "groups": [{"workers": 2, "tp": 4}, {"stages": [1, 3], "kv_tokens": 512, "threads": 2}]},
}


def test_each_rank_has_a_spec_of_its_own(tmp_path: Path) -> None:
    model = write_card(tmp_path / "model")
    found = workers(load_config(GROUPS), read_card(model), model, range(16))
    assert [(worker.name, worker.group, worker.section) for worker in found] == [
        ("prefill-0", 0, "prefill"),
        ("decode-0", 0, "decode.groups.0"),
        ("decode-1", 0, "decode.groups.0"),
        ("decode-2", 1, "decode.groups.1"),
    ]
    prefill, tensor, _, pipeline = (worker.ranks for worker in found)
    assert [(spec.rank, spec.tp, spec.stages, spec.threads) for spec in prefill] == [(rank, 2, (2, 2), 1) for rank in range(4)]
    assert [(spec.rank, spec.tp, spec.stages, spec.kv_tokens) for spec in tensor] == [(rank, 4, (), 1024) for rank in range(4)]
    assert [(spec.rank, spec.tp, spec.stages, spec.kv_tokens) for spec in pipeline] == [(rank, 1, (1, 3), 512) for rank in range(2)]
    cores = [cpu for worker in found for spec in worker.ranks for cpu in spec.cpus or ()]
    assert sorted(cores) == list(range(16)), "each rank has its own"


def test_staging_is_for_the_ranks_that_a_rank_has_a_route_to(tmp_path: Path) -> None:
    """To a decode worker of tp 4 over two KV heads each of two shards sends to two, from both its stages."""
    model = write_card(tmp_path / "model")
    found = workers(load_config(GROUPS), read_card(model), model, range(16))
    prefill, tensor, _, pipeline = (worker.ranks for worker in found)
    assert [spec.pairs for spec in tensor] == [2, 2, 2, 2], "one shard of each stage"
    assert [spec.pairs for spec in pipeline] == [2, 4], "both shards of stage 0; of stages 0 and 1"
    assert [spec.pairs for spec in prefill] == [2 * 2 + 2, 2 * 2 + 2, 2 * 2 + 1, 2 * 2 + 1]


def test_cores_are_not_chosen_on_a_ray_cluster_that_is_joined(tmp_path: Path) -> None:
    model = write_card(tmp_path / "model")
    found = workers(load_config({"ray": {"address": "somewhere:6379"}}), read_card(model), model, range(8))
    assert [worker.ranks[0].cpus for worker in found] == [None, None]


def test_available_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 999 kB\nMemAvailable:    4096 kB\n")
    assert available_bytes(meminfo, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\nactive_file 100\ninactive_file 200\n")
    assert available_bytes(meminfo, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("1500000\n")
    assert available_bytes(meminfo, tmp_path) == 500_300


def test_the_time_line_says_how_long_each_step_took() -> None:
    now = iter([1.0, 2.0, 4.5])
    line = TimeLine(lambda: next(now))
    line.mark("ray", "started")
    line.mark("router", "started")
    line.mark("ray", "ready")
    assert line.rows() == [
        ("  1.00 s", "ray", "started", ""),
        ("  2.00 s", "router", "started", ""),
        ("  4.50 s", "ray", "ready", "+3.50 s"),
    ]
