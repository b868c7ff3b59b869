"""Pools that size themselves: what is free, what a rank holds of it, and that the rank with the least decides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cluster_harness import write_card
from diptych.cluster.process.spec import BLOCK_SIZE, RankSpec
from diptych.cluster.resources import pool_size
from diptych.cluster.resources.memory import LEAST_TOKENS, MANY, blocks_in, most_tokens, pool_bytes, rank_layout, require_gpu_memory
from diptych.cluster.resources.pool_size import blocks_here, smallest
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.model import ModelCard, read_card
from torch.distributed import HashStore

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return read_card(write_card(tmp_path / "model", weights_bytes=1 << 30))


def rank(**changes: object) -> RankSpec:
    values = {"worker_id": "d", "phase": Phase.DECODE, "model_dir": "/", "pairs": 0, "memory_fraction": 0.5, **changes}
    return RankSpec.model_validate(values)


def full(layers: int) -> CacheGroup:
    return CacheGroup(CacheKind.FULL, layers=tuple(range(layers)), kv_heads=2, head_dim=8, dtype=DType.FLOAT32)


def test_blocks_are_as_many_as_fit_beside_what_attention_gathers() -> None:
    layout = Layout("", (full(3),), BLOCK_SIZE, (1,))
    block = BLOCK_SIZE * 2 * 2 * 8 * 4
    assert pool_bytes(layout) == 3 * block
    assert blocks_in(layout, 5 * block, DType.FLOAT32) == 1
    assert blocks_in(layout, 5 * block - 1, DType.FLOAT32) == 0
    assert blocks_in(layout, 1000 * block, DType.FLOAT32) == 200
    assert blocks_in(layout, -1, DType.FLOAT32) == 0


def test_int8_has_nearly_twice_the_blocks_of_bfloat16_in_the_same_memory() -> None:
    """Of head_dim 256 and 18 layers: 272 bytes a row for 512, and attention gathers one layer in bfloat16 whatever is held."""
    held = [CacheGroup(CacheKind.FULL, tuple(range(18)), kv_heads=1, head_dim=256, dtype=dtype) for dtype in (DType.BFLOAT16, DType.INT8)]
    layouts = [Layout("", (group,), BLOCK_SIZE, (1,)) for group in held]
    assert [pool_bytes(layout) for layout in layouts] == [BLOCK_SIZE * 18 * 2 * row for row in (512, 272)]
    assert [blocks_in(layout, 1 << 30, DType.BFLOAT16) for layout in layouts] == [
        (1 << 30) // (BLOCK_SIZE * row) for row in (20 * 1024, 18 * 544 + 2 * 1024)
    ]


def test_a_stage_without_kv_holds_any_number() -> None:
    assert blocks_in(Layout("", (full(0),), BLOCK_SIZE, (1,)), 0, DType.FLOAT32) == MANY


def here(card: ModelCard, spec: RankSpec) -> int:
    return blocks_here(card, spec, rank_layout(card, spec, BLOCK_SIZE), CPU)


def test_a_host_gives_a_fraction_of_what_the_weights_leave(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_size, "available_bytes", lambda: (1 << 30) + 4 * MIB)
    spec = rank(max_running=1024)
    fits = blocks_in(rank_layout(card, spec, BLOCK_SIZE), 2 * MIB, card.dtype)
    assert LEAST_TOKENS // BLOCK_SIZE < fits < most_tokens(card, spec) // BLOCK_SIZE
    assert here(card, spec) == fits
    assert here(card, spec.model_copy(update={"memory_fraction": 1.0})) == pytest.approx(2 * fits, abs=1)


def test_a_host_is_not_taken_whole(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_size, "available_bytes", lambda: 1 << 40)
    assert here(card, rank(max_running=4)) * BLOCK_SIZE == 4 * min(1024, card.max_context)


def test_what_leaves_no_room_is_refused(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_size, "available_bytes", lambda: (1 << 30) + 1000)
    with pytest.raises(ConfigError, match=r"leaves d 0.00 GiB of this host .*memory_fraction 0.5.*not enough for 256 tokens") as caught:
        here(card, rank())
    assert caught.value.field == "memory_fraction"


def test_the_rank_with_the_least_decides_and_all_know_it() -> None:
    store, room = HashStore(), [70, 31, 90, 31]
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda number: smallest(room[number], number, 4, store), range(4)))
    assert found == [(31, 1)] * 4
    assert smallest(12, 0, 1, None) == (12, 0)


def test_a_gpu_that_is_too_small_is_refused_with_what_would_fit(card: ModelCard) -> None:
    spec = rank(device="cuda")
    require_gpu_memory(card, spec, 2 << 30)
    with pytest.raises(
        ConfigError, match=r"tiny does not fit with tp 1, pp 1: rank 0 has 1.00 GiB .* may take 1.20 GiB. tp 2 would."
    ) as caught:
        require_gpu_memory(card, spec, 1229 * MIB)
    assert caught.value.field == "tp"
    require_gpu_memory(card, spec.model_copy(update={"tp": 2}), 1229 * MIB)
    with pytest.raises(ConfigError, match=r"No tp would"):
        require_gpu_memory(card, spec, 600 * MIB)


def test_where_no_tp_would_fit_a_pp_may(tmp_path: Path) -> None:
    card = read_card(write_card(tmp_path / "model", weights_bytes=1 << 30))
    spec = rank(device="cuda", tp=4)
    with pytest.raises(ConfigError, match=r"pp 2 would"):
        require_gpu_memory(card, spec, 800 * MIB)
