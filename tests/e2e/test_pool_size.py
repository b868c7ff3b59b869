"""Real ranks that size their pool themselves: the one with the least memory decides, the leader says so, and the worker serves with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.resources.memory import available_bytes
from diptych.core.fleet import Phase
from diptych.core.transfer import Transport
from e2e_harness import Rank, attached, rank_spec, request

MAX_RUNNING = 4
MOST = MAX_RUNNING * 1024 // 16
"""Blocks, where there is room."""
AUTO: dict[str, Any] = {"kv_tokens": None, "max_running": MAX_RUNNING, "transports": (Transport.SHM,)}


def blocks(rank: Rank) -> list[int]:
    layout: Any = rank.wait_for("ready")["layout"]
    return list(layout["num_blocks"])


def answer(rank: Rank) -> tuple[int, ...]:
    async def ask() -> tuple[int, ...]:
        async with attached(None, rank) as workers:
            said = await workers.local(request(range(3, 90)))
            await workers.idle()
            assert said.error is None
            return said.tokens

    return asyncio.run(ask())


@pytest.mark.timeout(300)
def test_the_rank_with_the_least_memory_decides(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Its pool of a hundred to three hundred blocks takes two thirds of two megabytes: what the host has free changes while ranks start."""
    alone = Rank.start(rank_spec(tiny_llama_dir, Phase.DECODE, "alone", **AUTO), tmp_path)
    leader = Rank.start(rank_spec(tiny_llama_dir, Phase.DECODE, "two", tp=2, **AUTO), tmp_path)
    try:
        address = str(leader.wait_for("meeting")["address"])
        little = leader.spec.model_copy(update={"rank": 1, "memory_fraction": (2 << 20) / available_bytes()})
        leader.followers.append(Rank.start(little, tmp_path, address))
        assert blocks(alone) == [MOST]
        (count,) = blocks(leader)
        assert 16 <= count < MOST
        assert leader.wait_for("ready")["capacity_tokens"] == min(count * 16, 1024)
        assert f"has {count} blocks, {count * 16} tokens: rank 1 of 2 has room for no more" in leader.log.read_text()
        assert f"The KV pool has {MOST} blocks" in alone.log.read_text()
        assert answer(leader) == answer(alone)
        assert leader.stop() == alone.stop() == 0
    finally:
        leader.kill()
        alone.kill()


@pytest.mark.timeout(300)
def test_a_rank_without_room_says_why(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rank = Rank.start(rank_spec(tiny_llama_dir, Phase.DECODE, "d", **AUTO, memory_fraction=1e-9), tmp_path)
    try:
        event = rank.wait_for("failed")
        assert event["field"] == "memory_fraction"
        assert "leaves d 0.00 GiB of this host for its KV pool" in str(event["message"])
        assert rank.ended() == 2
    finally:
        rank.kill()
