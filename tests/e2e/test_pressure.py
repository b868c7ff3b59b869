"""Pools too small for what is asked: prompts wait, running requests are preempted and recomputed, and every answer is the same."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from diptych.core.commands import Stop
from diptych.core.fleet import Phase
from diptych.core.request import Request, new_attempt_id
from e2e_harness import Answer, Rank, Workers, attached, rank_spec, ranks, request, wait_idle

AT_ONCE = 24


@pytest.fixture(scope="module")
def fleet(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    """Two prefill and two decode workers with pools for two or three requests each."""
    small = {"log_level": "info"}
    specs = [
        rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p0", kv_tokens=256, chunk_tokens=48, **small),
        rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p1", kv_tokens=512, chunk_tokens=100, **small),
        rank_spec(tiny_gemma3_dir, Phase.DECODE, "d0", kv_tokens=304, chunk_tokens=32, **small),
        rank_spec(tiny_gemma3_dir, Phase.DECODE, "d1", kv_tokens=400, chunk_tokens=17, **small),
    ]
    with ranks(tmp_path_factory.mktemp("pressure"), *specs) as started:
        yield started


def requests(seed: int) -> list[Request]:
    order = random.Random(seed)
    return [
        request(
            [2, *(order.randrange(3, 512) for _ in range(order.randrange(20, 150)))],
            max_tokens=order.randrange(1, 90),
            **({"temperature": 0.9, "seed": i} if i % 2 else {}),
            **({"repetition_penalty": 1.2, "frequency_penalty": 0.5} if i % 3 else {}),
        )
        for i in range(AT_ONCE)
    ]


def test_every_answer_comes_and_is_the_same_with_too_little_memory(fleet: list[Rank]) -> None:
    asked = requests(5)

    async def one(workers: Workers, number: int) -> Answer:
        return await (workers.local(asked[number]) if number % 4 == 0 else workers.disaggregated(asked[number]))

    async def main() -> None:
        async with attached(fleet[0], fleet[2]) as workers:
            alone = [await workers.local(each) for each in asked]
            together = await asyncio.gather(*(one(workers, number) for number in range(len(asked))))
            for solo, answer in zip(alone, together, strict=True):
                assert answer.error is None
                assert answer.tokens == solo.tokens
            await workers.idle()
            counters = dict((await wait_idle(workers.clients["d0"])).counters)
            assert counters["diptych_worker_recomputed_tokens_total"] > 0, "nobody was preempted: the pool is too large for this test"

    asyncio.run(main())


async def some_path(workers: Workers, asked: Request, expected: tuple[int, ...], order: random.Random) -> str:
    """One request, half of them stopped at some moment, on one side or both; what came of it."""
    attempt_id = new_attempt_id()
    path = workers.local if order.random() < 0.2 else workers.disaggregated
    task = asyncio.create_task(path(asked, attempt_id))
    stopped = order.random() < 0.5
    if stopped:
        await asyncio.sleep(order.random())
        for stream in order.sample([workers.prefill, workers.decode], order.choice([1, 2])):
            assert stream is not None
            stream.send(Stop(attempt_id))
    answer = await task
    if answer.error is None:
        assert answer.tokens == expected
        return "whole"
    assert stopped, answer.error
    return "stopped"


@pytest.mark.parametrize("seconds", [6.0, pytest.param(90.0, marks=pytest.mark.nightly)])
def test_requests_come_and_go_at_random_and_all_books_stay_right(fleet: list[Rank], seconds: float) -> None:
    order = random.Random(seconds)
    asked = requests(6)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            pairs = [await stack.enter_async_context(attached(prefill, decode)) for prefill in fleet[:2] for decode in fleet[2:]]
            known = [(await pairs[0].local(each)).tokens for each in asked]

            def start() -> asyncio.Task[str]:
                number = order.randrange(len(asked))
                return asyncio.create_task(some_path(order.choice(pairs), asked[number], known[number], order))

            ended: Counter[str] = Counter()
            running = {start() for _ in range(AT_ONCE)}
            until = time.monotonic() + seconds
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                ended.update(task.result() for task in done)
                if time.monotonic() < until:
                    running |= {start() for _ in done}
            assert min(ended["whole"], ended["stopped"]) > 10, ended
            for workers in pairs:
                await workers.idle()

    asyncio.run(main())
