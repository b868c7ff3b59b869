"""What the benchmarks must show, with the demo model on a quiet machine of two cores. Too long for the gate."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from diptych.benchmarks import handover, memory, rank_death, stall, start
from diptych.cluster.commands.while_up import settings
from diptych.core.layout import DType

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]
DEMO = {"model": None, "dtype": "bfloat16"}


def test_prompts_do_not_stall_answers() -> None:
    load = Namespace(rate=0.75, seconds=120.0, input=256, output=64, seed=1)
    result = stall.measure(settings(prefill=1, decode=1, **DEMO), load)
    assert result["handed_over"] == result["requests"]
    assert result["itl_p99_over_p50"] <= 2


def test_a_hand_over_is_cheap() -> None:
    result = handover.measure(Namespace(prompt=1024, runs=20, warm_up=3, **DEMO))
    assert result["transport"] == "shm"
    assert result["first_token_to_decode_started"]["p50_ms"] <= 5


def test_memory_is_bounded() -> None:
    result = memory.measure(Namespace(**DEMO))
    assert sorted(result["workers"]) == ["decode-0", "prefill-0"]
    assert all(worker["own_over_weights"] <= 0.15 for worker in result["workers"].values())
    assert result["weights_pss_over_weights"] <= 1.01


def test_the_start_is_fast() -> None:
    first, handed_over, _ = start.once(Namespace(no_ray=False, **DEMO))
    assert first <= handed_over <= 20


def test_a_worker_ends_with_its_ranks(demo_model_dir: Callable[[DType], Path]) -> None:
    seconds = asyncio.run(rank_death.measure(demo_model_dir(DType.BFLOAT16), 4))
    assert len(seconds) == 4, "leader and follower, of shards and of stages"
    assert max(chain.from_iterable(seconds.values())) <= 1
