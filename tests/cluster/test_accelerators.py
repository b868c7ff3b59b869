"""Workers on a kind of device: what a config may say of it, which nodes they go to, and a real cluster that does so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_harness import Cluster, write_card
from diptych.cluster.on_ray import room
from diptych.cluster.on_ray.launcher import _asked
from diptych.cluster.on_ray.nodes import Need, Node, Wanted, no_room, seat
from diptych.cluster.resources import preflight
from diptych.cluster.supervising.posts import launch_on_nodes, workers
from diptych.core.config import Placing, load_config
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from diptych.core.model import read_card
from real_harness import diptych, ray_of_others, up
from test_real_ranks import listens

APART: dict[str, Any] = {"prefill": {"accelerator": "H100"}, "decode": {"accelerator": "L40S"}}
JOINED = {"address": "10.0.0.1:6379"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**APART, "paired": True}, "paired: a pair shares a node.*prefill is to be on H100 and decode on L40S"),
        ({"prefill": {"accelerator": "H100"}, "paired": True}, "prefill is to be on H100 and decode on any"),
        ({**APART, "autoplan": {"mode": "propose", "profile": "P", "slo": "ttft=1s"}}, "autoplan.mode: workers are on H100 and L40S"),
    ],
)
def test_what_needs_one_kind_is_refused_with_two(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(values)
    assert re.search(said, refused.value.message), refused.value.message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ray": {}}, "prefill.accelerator: .* only on a Ray cluster that is joined.* --address"),
        ({"ray": JOINED}, "prefill.accelerator: .*device: auto computes on CPUs; with H100 say device: cuda"),
        ({"ray": JOINED, "prefill": {"groups": [{}, {"accelerator": "T4"}]}}, r"prefill.groups.1.accelerator: .* with T4 say"),
    ],
)
def test_a_kind_that_nobody_can_choose_is_refused_at_start(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        preflight.check_accelerators(load_config({**APART, **values}))
    assert re.search(said, refused.value.message), refused.value.message
    preflight.check_accelerators(load_config({**APART, "ray": JOINED, "device": "cuda"}))
    preflight.check_accelerators(load_config({}))


def test_each_rank_asks_for_the_kind_of_its_group(tmp_path: Path) -> None:
    model = write_card(tmp_path / "model")
    card = read_card(model)
    config = load_config(
        {
            "ray": JOINED,
            "prefill": {"accelerator": "H100", "groups": [{"tp": 2}, {"accelerator": "A100"}]},
            "decode": {"accelerator": "L40S"},
        }
    )
    launches = [launch_on_nodes(worker, config, card, "source", tmp_path) for worker in workers(config, card, model, range(4))]
    assert [[rank[3] for rank in _asked(launch)[2]] for launch in launches] == [["H100", "H100"], ["A100"], ["L40S"]]


def nodes(*kinds: str) -> list[Node]:
    return [Node(f"n{index}", f"10.0.0.{index}", 4, 100, accelerators=frozenset(kind.split())) for index, kind in enumerate(kinds)]


def on(*kinds: str) -> list[Wanted[Need]]:
    return [Wanted(phase, [Need(1, 0, 0.0, kind)]) for phase, kind in zip((Phase.PREFILL, Phase.DECODE), kinds, strict=False)]


@pytest.mark.parametrize("placing", Placing)
def test_a_worker_goes_to_a_node_of_its_kind(placing: Placing) -> None:
    def where(kind: str, *there: str) -> list[str]:
        return [node.node_id for places in seat(nodes(*there), on(kind), placing) or [] for node in places]

    assert where("L40S", "H100", "L40S", "") == ["n1"]
    assert where("L40S", "H100", "") == []
    assert where("A100-80G", "A100 A100-80G") == ["n0"], "Ray has two names for some"
    assert where("", "H100") == ["n0"]
    pair = seat(nodes("H100", "L40S"), on("L40S", "L40S"), placing)
    assert pair is not None
    assert {node.node_id for places in pair for node in places} == {"n1"}


def test_why_there_is_no_node_names_the_kinds_there_are() -> None:
    (prefill,) = on("B200")
    assert no_room({"prefill-0": prefill}, nodes("H100", "L40S")) == (
        "No node of the Ray cluster has B200 (Ray's accelerator_type) for prefill-0; there are 10.0.0.0: H100; 10.0.0.1: L40S."
    )
    full = Wanted(Phase.DECODE, [Need(9, 0, 0.0, "L40S")])
    assert no_room({"decode-0": full}, nodes("H100", "L40S")) == (
        "No node of the Ray cluster with L40S has 9 CPUs and 0.0 GiB free for decode-0 (free are 10.0.0.1: 4 CPUs, 0.0 GiB)."
    )
    both = dict(zip(("prefill-0", "decode-0"), on("L40S", "L40S"), strict=True))
    assert "which are a pair" in no_room(both, nodes("L40S"))


def test_ray_is_asked_for_the_kind_by_its_own_resource() -> None:
    assert room._resources(Need(2, 100, 1.0, "H100")) == {"CPU": 2, "memory": 100, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert room._resources(Need(2, 100)) == {"CPU": 2, "memory": 100}


# -- for real --------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_each_phase_is_served_by_nodes_of_its_kind(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode on the first node's kind, prefill on the second's, where packing would take one for both. CPUs that are called GPUs."""
    values = {"device": "cpu", "prefill": {"accelerator": "H100"}, "decode": {"accelerator": "L40S"}, "router": {"local_prefill": "never"}}
    for side in ("prefill", "decode"):
        values[side] |= {"kv_tokens": 8192}  # type: ignore[operator]
    file = runtime.parent / "plan.yaml"
    file.write_text(yaml.safe_dump(values))
    with ray_of_others(scratch, monkeypatch, 2, 2, kinds=("L40S", "H100")) as address:
        with up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address) as cluster:
            cluster.expect("Ctrl-C ends it.", 200)
            assert host_of(cluster, "prefill-0") == "127.0.0.2" != host_of(cluster, "decode-0"), "the one of that kind"
            answered = diptych("generate", "the thin man and the other thing in the inn", "--max-tokens", "8", "--temperature", "0")
            assert answered.returncode == 0, answered.stderr
            assert cluster.end() == 0
        values["prefill"] = {"accelerator": "B200"}
        file.write_text(yaml.safe_dump(values | {"ray": {"wait_s": 1}}))
        with up(tiny_gemma3_dir, runtime, "-f", str(file), "--address", address) as cluster:
            cluster.expect("has B200 (Ray's accelerator_type) for prefill-0; there are ", 100)


def host_of(cluster: Cluster, name: str) -> str:
    (pid,) = (one["pid"] for one in cluster.state()["processes"] if one["name"] == name)  # type: ignore[attr-defined]
    return listens(pid).rpartition(":")[0]
