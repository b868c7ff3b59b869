"""Which rank computes on what: GPUs for all, shared by fractions, or refused with what is there; and the CPU where there are none."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import write_card
from diptych.cluster.process.spec import RankSpec, Worker
from diptych.cluster.programs import loading
from diptych.cluster.resources import preflight
from diptych.cluster.resources.allotment import allot, gpus_of
from diptych.cluster.resources.devices import Gpu, assign, chosen, torch_cuda, visible_gpus
from diptych.cluster.supervising.posts import newcomers, workers
from diptych.core.config import load_config
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from diptych.core.model import ModelCard, read_card
from diptych.core.transfer import Transport
from fake_driver import FakeDriver

OLD_DRIVER = Gpu("0", "H100", 80 << 30, (12, 8), (9, 0))
OLD = Gpu("0", "Tesla T4", 16 << 30, (13, 0), (7, 5))
GPUS = [Gpu("0", "H100", 80 << 30), Gpu("3", "H100", 80 << 30)]


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return read_card(write_card(tmp_path / "model", weights_bytes=1 << 20))


def allotted(card: ModelCard, gpus: list[Gpu], **sections: Any) -> list[Worker]:
    config = load_config(sections)
    return allot(config, card, workers(config, card, Path("/model"), range(4)), gpus)


def given(found: list[Worker]) -> list[list[tuple[str, str | None, float]]]:
    return [[(spec.device, spec.gpu, spec.memory_fraction) for spec in worker.ranks] for worker in found]


def test_each_rank_has_a_gpu_of_its_own(card: ModelCard) -> None:
    assert given(allotted(card, GPUS)) == [[("cuda", "0", 0.9)], [("cuda", "3", 0.9)]]
    assert given(allotted(card, [*GPUS, *GPUS[:1]], decode={"tp": 2}))[1] == [("cuda", "3", 0.9), ("cuda", "0", 0.9)]


def test_workers_share_a_gpu_by_their_fractions(card: ModelCard) -> None:
    halves = {"memory_fraction": 0.5}
    assert given(allotted(card, GPUS[:1], prefill=halves, decode=halves)) == [[("cuda", "0", 0.5)], [("cuda", "0", 0.5)]]


@pytest.mark.parametrize(
    ("gpus", "sections", "where"),
    [
        (1, {}, [["0"], ["0"]]),
        (1, {"decode": {"workers": 2}}, [["0"], ["0"], ["0"]]),
        (2, {"decode": {"workers": 2}}, [["0"], ["0"], ["3"]]),
        (2, {"prefill": {"workers": 2}, "decode": {"workers": 2}}, [["0"], ["0"], ["3"], ["3"]]),
        (2, {"router": {"local_prefill": "always"}, "prefill": {"workers": 0}}, [["0"]]),
        (3, {"prefill": {"workers": 2}, "decode": {"tp": 2}}, [["0"], ["0"], ["3", "5"]]),
    ],
)
def test_workers_share_what_gpus_there_are_if_nobody_named_a_fraction(
    card: ModelCard, gpus: int, sections: dict[str, Any], where: list[list[str]]
) -> None:
    found = given(allotted(card, [*GPUS, Gpu("5", "H100", 80 << 30)][:gpus], **sections))
    assert [[gpu for _, gpu, _ in ranks] for ranks in found] == where
    keys = [key for ranks in where for key in ranks]
    fractions = {len(ranks): fraction for ranks in found for _, _, fraction in ranks}
    assert fractions.pop(2, 0.9) == 0.9
    assert fractions == {1: {1: 0.9, 2: 0.45, 3: 0.3}[max(map(keys.count, keys))]}


def test_that_workers_share_a_gpu_is_said(card: ModelCard) -> None:
    config = load_config({"decode": {"workers": 2}})
    found = allot(config, card, workers(config, card, Path("/model"), range(4)), GPUS)
    said = [note for note in preflight.warnings(config, card, found, 4) if "GPU" in note]
    assert len(said) == 1
    assert said[0].startswith("prefill-0, decode-0 share GPU 0, 0.45 of its memory each: there are more workers than GPUs.")
    halves = load_config({"prefill": {"memory_fraction": 0.5}, "decode": {"memory_fraction": 0.5}})
    found = allot(halves, card, workers(halves, card, Path("/model"), range(4)), GPUS[:1])
    assert not any("GPU" in note for note in preflight.warnings(halves, card, found, 4)), "it was asked for"


def test_a_newcomer_shares_what_those_that_share_have_left(card: ModelCard) -> None:
    config = load_config({"decode": {"workers": 2}})
    present = allot(config, card, workers(config, card, Path("/model"), range(4)), GPUS)
    joining = newcomers(config, card, Path("/model"), range(4), present, [(Phase.DECODE, 0, 2)])
    assert given(allot(config, card, joining, GPUS, present)) == [[("cuda", "3", 0.45)]]


def test_more_ranks_than_gpus_are_refused_with_what_is_there(card: ModelCard) -> None:
    with pytest.raises(ConfigError) as caught:
        allotted(card, GPUS, prefill={"memory_fraction": 0.9}, decode={"workers": 2})
    assert caught.value.field == "device"
    assert caught.value.message == (
        "device: 3 ranks are more than the GPUs have room for: decode-1 finds none. Here are 0: H100 (80 GiB), 3: H100 (80 GiB). Start "
        "fewer workers, with fewer ranks; workers may share a GPU with a memory_fraction of at most 0.45 each, or say device: cpu."
    )


def test_ranks_of_one_worker_do_not_share(card: ModelCard) -> None:
    with pytest.raises(ConfigError, match="decode-0 finds none"):
        assign(GPUS, [("decode-0", [0.1] * 3)], {})


def test_a_newcomer_goes_where_there_is_room(card: ModelCard) -> None:
    config = load_config({"prefill": {"memory_fraction": 0.6}, "decode": {"memory_fraction": 0.4}})
    present = allot(config, card, workers(config, card, Path("/model"), range(4)), GPUS)
    assert given(present) == [[("cuda", "0", 0.6)], [("cuda", "0", 0.4)]]
    joining = newcomers(config, card, Path("/model"), range(4), present, [(Phase.DECODE, 0, 1)])
    assert given(allot(config, card, joining, GPUS, present)) == [[("cuda", "3", 0.4)]]


def test_a_model_that_a_gpu_cannot_hold_is_refused_by_key(tmp_path: Path) -> None:
    card = read_card(write_card(tmp_path / "model", weights_bytes=100 << 30))
    with pytest.raises(ConfigError, match=r"^prefill.tp: tiny does not fit with tp 1, pp 1: .* tp 2 would") as caught:
        allotted(card, GPUS)
    assert caught.value.field == "prefill.tp"


def test_without_gpus_ranks_share_half_of_the_host(card: ModelCard) -> None:
    found = allotted(card, [], prefill={"workers": 2}, decode={"tp": 2, "memory_fraction": 0.3, "kv_tokens": 512})
    assert given(found) == [[("cpu", None, 0.125)]] * 2 + [[("cpu", None, 0.3)] * 2]
    assert [worker.ranks[0].kv_tokens for worker in found] == [None, None, 512]


def test_on_a_joined_cluster_a_node_is_asked_for_a_size(card: ModelCard) -> None:
    found = allotted(card, [], ray={"address": "somewhere:6379"}, decode={"max_running": 2})
    assert [worker.ranks[0].kv_tokens for worker in found] == [2 * min(1024, card.max_context)] * 2


def test_on_a_joined_cluster_ray_gives_the_gpus(card: ModelCard) -> None:
    found = allotted(card, [], device="cuda", ray={"address": "somewhere:6379"}, prefill={"memory_fraction": 0.4}, decode={"tp": 2})
    assert given(found) == [[("cuda", None, 0.4)], [("cuda", None, 0.9)] * 2]
    assert [worker.ranks[0].kv_tokens for worker in found] == [None, None]
    assert [[gpus_of(spec, len(worker.ranks)) for spec in worker.ranks] for worker in found] == [[0.4], [1.0, 1.0]]
    assert found[0].ranks[0].transports == (Transport.CUDA_IPC, Transport.NCCL)


@pytest.mark.parametrize(
    ("wanted", "gpus", "cuda", "found"),
    [
        ("auto", GPUS, "13.0", GPUS),
        ("auto", [], "13.0", ()),
        ("auto", GPUS, None, ()),
        ("cpu", GPUS, "13.0", ()),
        ("cuda", GPUS, "13.0", GPUS),
        ("auto", [OLD_DRIVER], "13.0", ()),
        ("auto", [OLD_DRIVER], "12.9", [OLD_DRIVER]),
        ("auto", [OLD], "13.0", ()),
        ("cuda", [OLD, *GPUS], "13.0", GPUS),
    ],
)
def test_what_is_computed_on(wanted: str, gpus: list[Gpu], cuda: str | None, found: object) -> None:
    assert chosen(wanted, gpus, cuda) == found


@pytest.mark.parametrize(
    ("gpus", "cuda", "says"),
    [
        (
            [OLD_DRIVER],
            "13.0",
            "driver here runs CUDA up to 12.8, and torch is built for 13.0: install a newer driver, or torch for CUDA 12",
        ),
        ([OLD], "13.0", r"need compute capability 8.0, which no GPU here has \(0: Tesla T4, 7.5\)"),
        ([], "13.0", "no GPU that CUDA can use; device: cpu would work"),
        (GPUS, None, "torch installed here is a CPU build. Here are 0: H100"),
    ],
)
def test_a_device_that_is_not_there_is_refused(gpus: list[Gpu], cuda: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        chosen("cuda", gpus, cuda)
    assert caught.value.field == "device"


def test_this_host_is_asked_without_torch() -> None:
    import torch

    assert torch_cuda() == torch.version.cuda
    assert len(visible_gpus()) == torch.cuda.device_count()


def test_a_host_without_nvidias_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert visible_gpus() == []


def test_what_the_driver_says_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(12080, [("NVIDIA L4", 24 << 30, (8, 9)), ("Tesla T4", 16 << 30, (7, 5))]))
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-abc"}) == [
        Gpu("3", "NVIDIA L4", 24 << 30, (12, 8), (8, 9)),
        Gpu("GPU-abc", "Tesla T4", 16 << 30, (12, 8), (7, 5)),
    ]


RANK = RankSpec(worker_id="d", phase=Phase.DECODE, model_dir=Path("/"), device="cuda", gpu="7")


def test_a_rank_says_what_its_device_lacks() -> None:
    with pytest.raises(ConfigError, match="d is to compute on GPU 7, but torch"):
        loading._device(RANK)


@pytest.mark.parametrize(
    ("version", "capability", "says"), [(12080, (9, 0), "runs CUDA up to 12.8, and torch is built for 13.0"), (13000, (7, 5), "T4, 7.5")]
)
def test_a_rank_says_why_torch_cannot_use_its_gpu(
    version: int, capability: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node of a Ray cluster nobody has looked before."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(version, [("Tesla T4", 16 << 30, capability)]))
    monkeypatch.setattr(loading.torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=f"d is to compute on GPU 7, but .*{says}"):
        loading._device(RANK)
