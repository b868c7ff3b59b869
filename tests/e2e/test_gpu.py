"""Two workers on one GPU, each with a fraction of its memory, whose pools size themselves, and the tokens of the CPU. Runs only where there
is a GPU: nobody has run it on this machine."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from diptych.core.fleet import Phase
from diptych.core.transfer import Transport
from e2e_harness import Answer, Rank, attached, rank_spec, ranks, request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}]
HALF: dict[str, Any] = {"device": "cuda", "gpu": "0", "kv_tokens": None, "memory_fraction": 0.4}


def prompt(length: int) -> list[int]:
    order = random.Random(length)
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


def blocks(rank: Rank) -> int:
    layout: Any = rank.wait_for("ready")["layout"]
    return int(layout["num_blocks"][0])


def answers(prefill: Rank, decode: Rank) -> list[Answer]:
    async def ask() -> list[Answer]:
        async with attached(prefill, decode) as workers:
            asked = [request(prompt(length), max_tokens=16, **sampling) for length in (17, 100, 333) for sampling in SAMPLINGS]
            said = [await workers.disaggregated(each) for each in asked]
            await workers.idle()
            return said

    return asyncio.run(ask())


@pytest.mark.parametrize("transport", [Transport.CUDA_IPC, Transport.NCCL])
def test_two_workers_share_a_gpu_and_write_what_the_cpu_writes(tiny_gemma3_dir: Path, tmp_path: Path, transport: Transport) -> None:
    pairs = [(f"{where}-{phase.value}", phase, where) for where in ("cpu", "gpu") for phase in Phase]
    specs = [
        rank_spec(tiny_gemma3_dir, phase, name, **(HALF | {"transports": (transport,)} if where == "gpu" else {}))
        for name, phase, where in pairs
    ]
    with ranks(tmp_path, *specs) as (prefill, decode, gpu_prefill, gpu_decode):
        expected, found = answers(prefill, decode), answers(gpu_prefill, gpu_decode)
        assert [answer.error for answer in found] == [None] * len(expected)
        assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
        assert {answer.handed_over.transport for answer in found if answer.handed_over} == {transport.value}
        assert min(blocks(gpu_prefill), blocks(gpu_decode)) > 10_000, "most of the memory that is theirs"
