"""What is refused at start, by name and with what to do; and the reference made from the schema."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import write_card
from diptych.cluster import config_docs
from diptych.cluster.process.spec import BLOCK_SIZE, RankSpec, Worker
from diptych.cluster.resources import preflight
from diptych.cluster.resources.layouts import layouts
from diptych.cluster.resources.memory import kv_bytes, pool_bytes, process_bytes, require_memory, weights_bytes
from diptych.cluster.supervising.config_file import read_config
from diptych.cluster.supervising.models import find_model
from diptych.cluster.supervising.posts import workers
from diptych.core.config import ClusterConfig, load_config
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from diptych.core.model import ForeignDecoder, ModelCard, read_card

ROOT = Path(__file__).resolve().parents[2]


def refused(tmp_path: Path, text: str, **overrides: Any) -> ConfigError:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(file, {key.replace("__", "."): value for key, value in overrides.items()})
    return caught.value


def test_flags_override_the_file_and_absent_ones_do_not(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("prefill:\n  workers: 2\ndecode:\n  workers: 3\n")
    config = read_config(file, {"prefill.workers": 5, "decode.workers": None, "router.http_port": 0})
    assert (config.prefill.workers, config.decode.workers, config.router.http_port) == (5, 3, 0)


def test_an_empty_section_is_a_section_of_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("# nothing\n")
    assert read_config(file, {}) == load_config({})
    assert read_config(None, {}) == load_config({})


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("prefil:\n  workers: 1\n", "prefil", "Did you mean prefill?"),
        ("router:\n  htp_port: 1\n", "router.htp_port", "Did you mean http_port?"),
        ("router:\n  limits:\n    runing: 1\n", "router.limits.runing", "Did you mean running?"),
        ("decode:\n  workers: many\n", "decode.workers", "'many'"),
        ("decode:\n  workers: 0\n", "decode.workers", "greater than or equal to 1"),
        ("decode:\n  workers: 1.5\n", "decode.workers", "1.5"),
        ("model:\n  dtype: int4\n", "model.dtype", "'float16' or 'float32'"),
        ("model:\n  kv_dtype: fp8\n", "model.kv_dtype", "'auto' or 'int8'"),
        ("router:\n  http_port: 99999\n", "router.http_port", "65535"),
        ("transfer:\n  lease_s: -1\n", "transfer.lease_s", "greater than 0"),
        ("name: Bad Name\n", "name", "Bad Name"),
        ("decode: 3\n", "decode", "3"),
        ("prefill:\n  workers: 0\nrouter:\n  local_prefill: never\n", "prefill.workers", "nobody could read a prompt"),
        ("router:\n  local_prefill: always\n", "prefill.workers", "set prefill.workers to 0"),
        ("- a\n- list\n", "file", "must hold keys and values, not a list"),
        ("just text", "file", "not a str"),
        ("decode:\n  workers: 1\n  workers: 2\n", "file", "'workers' is given twice"),
        ("decode: {workers: [\n", "file", "is not YAML"),
        ("1: 2\n", "file", "key 1 is not a word"),
        ("prefill:\n  tp: 0\n", "prefill.tp", "greater than or equal to 1"),
        ("decode:\n  groups:\n  - tpp: 2\n", "decode.groups.0.tpp", "Did you mean tp?"),
        ("decode:\n  groups: 2\n", "decode.groups", "2"),
        ("decode:\n  groups:\n  - {tp: 2}\n  - {tp: two}\n", "decode.groups.1.tp", "'two'"),
        ("decode:\n  groups: [{stages: [4]}]\n", "decode.groups.0.stages", "at least 2 items"),
        ("decode:\n  groups: [{stages: [4, 0]}]\n", "decode.groups.0.stages.1", "greater than 0"),
        ("decode:\n  groups: [{stages: [1, 3], pp: 3}]\n", "decode.groups.0.pp", "its stages are 2"),
        ("prefill:\n  workers: 2\n  groups: [{tp: 2}]\n", "prefill.workers", "prefill.groups are both given"),
        ("prefill:\n  tp: 2\n  groups: [{tp: 2}]\n", "prefill.tp", "leave prefill.tp out"),
        ("decode:\n  pp: 1\n  groups: [{tp: 2}]\n", "decode.pp", "leave decode.pp out"),
        ("decode:\n  groups: [{workers: 0}, {workers: 0}]\n", "decode.groups", "nobody could write"),
        ("prefill:\n  groups: [{workers: 0}]\nrouter:\n  local_prefill: never\n", "prefill.groups", "nobody could read"),
        ("prefill:\n  groups: [{tp: 2}]\nrouter:\n  local_prefill: always\n", "prefill.groups", "in place of prefill.groups"),
    ],
)
def test_a_wrong_file_is_refused_by_key_with_what_to_do(tmp_path: Path, text: str, field: str, says: str) -> None:
    error = refused(tmp_path, text)
    assert error.field == field
    assert says in error.message
    assert "\n" not in error.message


def test_a_flag_beside_groups_of_the_file_is_refused_too(tmp_path: Path) -> None:
    assert refused(tmp_path, "decode:\n  groups: [{tp: 2}]\n", decode__pp=2).field == "decode.pp"
    assert refused(tmp_path, "decode:\n  groups: [{tp: 2}]\n", decode__workers=2).field == "decode.workers"


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no config file"):
        read_config(tmp_path / "nowhere.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "latin.yaml", {})


def test_a_flag_into_a_section_that_is_none_is_refused_for_the_section(tmp_path: Path) -> None:
    assert refused(tmp_path, "decode: 3\n", decode__workers=2).field == "decode"


@pytest.mark.parametrize("key", ["http_port", "grpc_port"])
def test_a_port_in_use_is_refused_by_key_and_flag(key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            preflight.check_ports(load_config({"router": {"http_port": 0, "grpc_port": 0, key: port}}))
    assert caught.value.field == f"router.{key}"
    assert f"127.0.0.1:{port}" in caught.value.message
    assert f"--{key.replace('_', '-')}" in caught.value.message


def test_one_port_for_both_faces_is_refused() -> None:
    with pytest.raises(ConfigError, match="are both 9000"):
        preflight.check_ports(load_config({"router": {"http_port": 9000, "grpc_port": 9000}}))


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_a_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight.check_ports(load_config({"router": {"host": host, "http_port": 0, "grpc_port": 0}}))
    assert caught.value.field == "router.host"


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"), ("ray://host:1", "is not host:port"), ("host", "is not host:port")],
)
def test_a_ray_cluster_that_is_not_there_is_refused(address: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight.check_ray(load_config({"ray": {"address": address}}))
    assert caught.value.field == "ray.address"
    assert says in caught.value.message


def with_model(directory: Path, **config: Any) -> ClusterConfig:
    return load_config({"model": {"source": str(directory)}, **config})


def planned(config: ClusterConfig) -> list[Worker]:
    directory = Path(str(config.model.source))
    return workers(config, read_card(directory), directory, range(2))


def test_too_little_memory_is_refused_with_the_pool_that_asks_most(tmp_path: Path) -> None:
    directory = write_card(tmp_path / "model")
    config = with_model(directory, decode={"kv_tokens": 10**10}, prefill={"kv_tokens": 1024})
    with pytest.raises(ConfigError) as caught:
        preflight.check_memory(config, read_card(directory), planned(config))
    assert caught.value.field == "decode.kv_tokens"
    assert "not enough memory" in caught.value.message
    assert "Lower decode.kv_tokens" in caught.value.message


def test_staging_is_counted_for_every_pair_that_gloo_may_make(tmp_path: Path) -> None:
    directory = write_card(tmp_path / "model")

    def wanted(**transfer: Any) -> dict[str, int]:
        config = with_model(directory, prefill={"workers": 2}, decode={"workers": 3}, transfer=transfer)
        return {worker.name: kv_bytes(read_card(directory), worker.ranks[0]) for worker in planned(config)}

    alone, both = wanted(transports=["shm"]), wanted()
    pair = 4 * ((16 << 20) + 4096)  # slots, each a page and a piece
    assert {name: both[name] - alone[name] for name in ("prefill-0", "decode-0")} == {
        "prefill-0": 3 * pair,
        "decode-0": 2 * pair,
    }
    spec = RankSpec(worker_id="d", phase=Phase.DECODE, model_dir=directory, pairs=3)
    with pytest.raises(ConfigError, match="with staging for its transfers") as caught:
        require_memory(read_card(directory), spec, 192 << 20)
    assert caught.value.field == "kv_tokens"
    require_memory(read_card(directory), spec, 208 << 20)


@pytest.mark.parametrize(
    ("section", "field", "says"),
    [
        (
            {"tp": 3},
            "prefill.tp",
            "tp 3 does not split tiny, which has 4 attention heads, 2 KV heads and an MLP of 16; the nearest that does is 2",
        ),
        ({"pp": 5}, "prefill.pp", "pp 5 is more than the 4 layers of tiny; at most 4 stages"),
        ({"pp": 10**9}, "prefill.pp", "at most 4 stages"),
        ({"groups": [{"tp": 2}, {"tp": 8}]}, "prefill.groups.1.tp", "the nearest that does is 4"),
        ({"groups": [{"stages": [2, 3]}]}, "prefill.groups.0.stages", "the 4 layers of tiny; (2, 2) would"),
    ],
)
def test_a_parallelism_the_model_cannot_have_is_refused_by_key_model_and_what_works(
    tmp_path: Path, section: dict[str, Any], field: str, says: str
) -> None:
    directory = write_card(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        planned(with_model(directory, prefill=section))
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: ")
    assert says in caught.value.message


@pytest.mark.parametrize(("section", "field"), [({"tp": 2}, "decode.tp"), ({"pp": 2}, "decode.pp")])
def test_a_model_on_the_slow_path_is_not_spread(tmp_path: Path, section: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=r"has no fast path here.*So it cannot be spread over ranks") as caught:
        layouts(load_config({"decode": section}), foreign(read_card(write_card(tmp_path / "model"))))
    assert caught.value.field == field


SPREAD = [{"tp": 2}, {"tp": 4}, {"pp": 2}, {"tp": 2, "pp": 2}, {"groups": [{"stages": [1, 3]}]}, {"tp": 4, "pp": 4}]


@pytest.mark.parametrize("section", SPREAD, ids=str)
def test_the_ranks_of_a_worker_share_its_memory_out(tmp_path: Path, section: dict[str, Any]) -> None:
    """KV heads that several shards have count for each; two tables of embedding and head are four rows of a thousand here."""
    directory = write_card(tmp_path / "model", weights_bytes=1 << 20)
    card = read_card(directory)
    config = with_model(directory, decode=section | {"kv_tokens": 16384}, transfer={"transports": ["shm"]})
    ranks = planned(config)[-1].ranks
    whole = pool_bytes(card.layout(block_size=BLOCK_SIZE, kv_tokens=16384))
    assert sum(kv_bytes(card, spec) for spec in ranks) == whole * max(1, ranks[0].tp // 2)
    assert sum(weights_bytes(card, spec) for spec in ranks) == pytest.approx(1 << 20, rel=0.01)


def test_shards_have_copies_of_the_weights_they_cut_by_columns(tmp_path: Path) -> None:
    card = read_card(write_card(tmp_path / "model"))
    alone = RankSpec(worker_id="d", phase=Phase.DECODE, model_dir=tmp_path)
    copies = 4 * 8 * (4 * 8 + 16) * 4
    for stages in ((), (1, 3)):
        ranks = [alone.model_copy(update={"tp": 2, "stages": stages, "rank": rank}) for rank in range(2 * max(1, len(stages)))]
        assert sum(process_bytes(card, spec) - process_bytes(card, alone) for spec in ranks) == copies
    assert process_bytes(card, alone.model_copy(update={"stages": (1, 3)})) == process_bytes(card, alone), "stages are views"
    assert process_bytes(card, alone.model_copy(update={"tp": 2, "device": "cuda"})) == process_bytes(card, alone), "the GPU has them"


def test_a_rank_needs_memory_for_its_own_part_alone(tmp_path: Path) -> None:
    card = read_card(write_card(tmp_path / "model", weights_bytes=1 << 30))
    whole = RankSpec(worker_id="d", phase=Phase.DECODE, model_dir=tmp_path, kv_tokens=1 << 20, pairs=0)
    with pytest.raises(ConfigError, match=r"takes 0.50 GiB and the weights 1.00 GiB"):
        require_memory(card, whole, 1 << 30)
    for rank in range(4):
        require_memory(card, whole.model_copy(update={"tp": 2, "stages": (2, 2), "rank": rank}), 400 << 20)


def test_too_little_memory_for_a_group_is_refused_by_the_group(tmp_path: Path) -> None:
    directory = write_card(tmp_path / "model")
    config = with_model(directory, decode={"groups": [{"tp": 2}, {"pp": 2, "kv_tokens": 10**10}]})
    with pytest.raises(ConfigError) as caught:
        preflight.check_memory(config, read_card(directory), planned(config))
    assert caught.value.field == "decode.groups.1.kv_tokens"


def test_weights_count_once_however_many_workers_map_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_card(tmp_path / "model", weights_bytes=8 << 30)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 12 << 30)
    config = with_model(directory, decode={"workers": 4}, ray={"enabled": False})
    preflight.check_memory(config, read_card(directory), planned(config))


def test_too_many_workers_for_the_cores_is_said_not_refused(tmp_path: Path) -> None:
    directory = write_card(tmp_path / "model")
    config = with_model(directory, decode={"workers": 5})
    said = preflight.warnings(config, read_card(directory), planned(config), 2)
    assert "6 workers with 6 threads share 2 cores" in said[0]
    assert "no chat template" in said[1]
    config = with_model(directory, prefill={"tp": 2}, decode={"tp": 2, "pp": 2})
    assert "2 workers of 6 ranks with 6 threads share 2 cores" in preflight.warnings(config, read_card(directory), planned(config), 2)[0]


def foreign(card: ModelCard) -> ModelCard:
    """The same model, of a family that transformers computes."""
    decoder = ForeignDecoder(
        family="phi", architecture="PhiForCausalLM", config={}, layers=2, heads=1, kv_heads=1, head_dim=8, windows=(0, 0)
    )
    return card.model_copy(update={"decoder": decoder})


def test_the_slow_path_is_said_at_start(tmp_path: Path) -> None:
    directory = write_card(tmp_path / "model")
    fast, config = read_card(directory), with_model(directory)
    slow = foreign(fast)
    said = [preflight.warnings(config, card, planned(config), 2) for card in (fast, slow)]
    assert [line for line in said[1] if line not in said[0]] == [
        "tiny (PhiForCausalLM) has no fast path here: it runs through transformers, slower."
    ]
    (spec,) = planned(config)[0].ranks
    assert process_bytes(slow, spec) - process_bytes(fast, spec) == 120 << 20


def test_the_model_must_exist_and_be_what_is_asked_for(tmp_path: Path) -> None:
    directory = write_card(tmp_path / "model")
    assert find_model(with_model(directory)) == directory
    for model, field in [
        ({"source": "/nowhere/model"}, "model.source"),
        ({"source": "./nowhere"}, "model.source"),
        ({"source": str(directory), "dtype": "bfloat16"}, "model.dtype"),
        ({"source": str(directory), "chat_template": "/nowhere.jinja"}, "model.chat_template"),
    ]:
        with pytest.raises(ConfigError) as caught:
            find_model(load_config({"model": model}))
        assert caught.value.field == field


def test_without_a_model_and_without_the_demo_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.cluster.supervising.models.demo_source", lambda: None)
    with pytest.raises(ConfigError, match="Name one with --model") as caught:
        find_model(load_config({}))
    assert caught.value.field == "model.source"


def test_the_reference_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == config_docs.reference(), "python -m diptych.cluster.config_docs docs/config.md"
    for key in re.findall(r"^  (\w+):", (ROOT / "examples" / "cluster.yaml").read_text(), re.M):
        assert f".{key}`" in config_docs.reference()


def test_the_example_is_right() -> None:
    assert read_config(ROOT / "examples" / "cluster.yaml", {}).decode.workers == 2


def test_the_schema_describes_every_key() -> None:
    schema = json.loads(config_docs.schema_text())
    assert schema["additionalProperties"] is False
    assert all("description" in key for section in schema["$defs"].values() for key in section.get("properties", {}).values())
