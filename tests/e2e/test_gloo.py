"""KV over gloo between real ranks: the same tokens, and the transport that the operator allows, or none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from diptych.core.fleet import Phase
from e2e_harness import Rank, attached, rank_spec, ranks, request


def prompt(length: int, seed: int = 0) -> list[int]:
    return [2, *(3 + (7 * position + 11 * seed + position // 5) % 500 for position in range(length - 1))]


def test_the_same_tokens_over_gloo_as_colocated(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    prefill = rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p", transports=["gloo"])
    decode = rank_spec(tiny_gemma3_dir, Phase.DECODE, "d")

    async def main(p: Rank, d: Rank) -> None:
        async with attached(p, d) as workers:
            for length in (1, 16, 17, 100, 333):
                asked = request(prompt(length), max_tokens=8)
                apart, together = await workers.disaggregated(asked), await workers.local(asked)
                assert apart.error is None
                assert apart.tokens == together.tokens
                assert apart.handed_over is not None
                assert apart.handed_over.transport == "gloo"
            many = [request(prompt(20 + 13 * index, index), max_tokens=6) for index in range(12)]
            answers = await asyncio.gather(*(workers.disaggregated(asked) for asked in many))
            for asked, answer in zip(many, answers, strict=True):
                assert answer.tokens == (await workers.local(asked)).tokens
            await workers.idle()
        assert "KV comes from p over gloo" in d.log.read_text()

    with ranks(tmp_path, prefill, decode) as (p, d):
        asyncio.run(main(p, d))


def test_nothing_is_used_that_one_end_may_not_use(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    prefill = rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p", transports=["gloo"])
    decode = rank_spec(tiny_gemma3_dir, Phase.DECODE, "d", transports=["shm"])

    async def main(p: Rank, d: Rank) -> None:
        async with attached(p, d) as workers:
            answer = await workers.disaggregated(request(prompt(40), max_tokens=4))
            assert answer.error is not None
            await workers.idle()
        assert "no transport in common: d may use shm and p may use gloo" in p.log.read_text()

    with ranks(tmp_path, prefill, decode) as (p, d):
        asyncio.run(main(p, d))


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_an_address_that_names_all_interfaces_is_not_advertised(tiny_gemma3_dir: Path, tmp_path: Path, listen: str) -> None:
    rank = Rank.start(rank_spec(tiny_gemma3_dir, Phase.DECODE, "d", listen=listen), tmp_path)
    try:
        failed = rank.wait_for("failed")
        assert failed["field"] == "advertise"
    finally:
        rank.kill()
