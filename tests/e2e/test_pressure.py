"""Pools too small for what is asked: prompts wait, running requests are preempted and recomputed, and every answer is the same."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from diptych.core.fleet import Phase
from e2e_harness import Answer, Workers, attached, rank_spec, ranks, request, wait_idle


def test_every_answer_comes_and_is_the_same_with_too_little_memory(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    order = random.Random(5)
    asked = [
        request([2, *(order.randrange(3, 512) for _ in range(order.randrange(20, 100)))], max_tokens=order.randrange(20, 100))
        for _ in range(24)
    ]
    specs = [
        rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p0", kv_tokens=256, chunk_tokens=48),
        rank_spec(tiny_gemma3_dir, Phase.DECODE, "d0", kv_tokens=304, chunk_tokens=32),
    ]

    async def one(workers: Workers, number: int) -> Answer:
        return await (workers.local(asked[number]) if number % 4 == 0 else workers.disaggregated(asked[number]))

    with ranks(tmp_path, *specs) as pair:

        async def main() -> None:
            async with attached(*pair) as workers:
                alone = [await workers.local(each) for each in asked]
                together = await asyncio.gather(*(one(workers, number) for number in range(len(asked))))
                for solo, answer in zip(alone, together, strict=True):
                    assert answer.error is None
                    assert answer.tokens == solo.tokens
                await workers.idle()
                counters = dict((await wait_idle(workers.clients["d0"])).counters)
                assert counters["diptych_worker_recomputed_tokens_total"] > 0, "nobody was preempted: the pool is too large for this test"

        asyncio.run(main())
