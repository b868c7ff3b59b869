"""The router over real ranks: same answers on every path, and nothing left of clients that leave. (Workers that die: `test_kills`.)"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import openai
from diptych.core.fleet import LocalPrefill
from diptych.core.generate import Generate, Timing
from diptych.core.sampling import SamplingParams
from diptych.router.server import Router
from e2e_harness import Family, Rank
from router_harness import idle, router

PROMPTS = ["the man in the inn " * n for n in (1, 4, 9, 17)]
Answer = tuple[str, Timing]


async def answer(running: Router, prompt: str, seed: int, *, max_tokens: int = 24) -> Answer:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    chunks = [chunk async for chunk in running.service.generate(Generate(prompt, sampling=sampling))]
    finish = chunks[-1].finish
    assert finish is not None
    assert finish.usage.output_tokens == max_tokens
    return "".join(chunk.text for chunk in chunks), finish.timing


async def all_answers(workers: Sequence[Rank], policy: LocalPrefill) -> list[Answer]:
    async with router(workers, policy) as running:
        answers = await asyncio.gather(*(answer(running, prompt, seed) for prompt in PROMPTS for seed in (1, 2)))
        await idle(running)
        return answers


def test_the_same_text_on_every_path(family: Family) -> None:
    workers = [*family.prefills, family.decode]
    apart, alone = (asyncio.run(all_answers(workers, policy)) for policy in (LocalPrefill.NEVER, LocalPrefill.ALWAYS))
    assert [text for text, _ in apart] == [text for text, _ in alone]
    assert {timing.transport for _, timing in apart} == {"shm"}
    assert {timing.prefill_worker for _, timing in apart} == {"p0", "p1"}
    assert all(timing.kv_bytes > 0 and timing.handover_gap is not None for _, timing in apart)
    assert {timing.prefill_worker for _, timing in alone} == {""}


def test_clients_that_leave_at_any_moment_leave_nothing(gemma3_ranks: Family) -> None:
    dice = random.Random(7)

    async def visit(client: openai.AsyncOpenAI, i: int) -> None:
        stay = dice.choice([0.0, 0.01, 0.05, 0.1, 0.3])
        request = client.completions.create(
            model="", prompt=dice.choice(PROMPTS), max_tokens=60, seed=i, stream=dice.random() < 0.5, extra_body={"ignore_eos": True}
        )
        task = asyncio.ensure_future(request)
        await asyncio.sleep(stay)
        task.cancel()
        for result in await asyncio.gather(task, return_exceptions=True):
            if isinstance(result, openai.AsyncStream):
                await result.close()

    async def check() -> None:
        async with router([*gemma3_ranks.prefills, gemma3_ranks.decode]) as running:
            before, _ = await answer(running, PROMPTS[2], 5)
            async with openai.AsyncOpenAI(base_url=f"http://{running.http}/v1", api_key="none", max_retries=0) as client:
                for _ in range(3):
                    await asyncio.gather(*(visit(client, i) for i in range(12)))
            await idle(running)
            assert running.service.running == 0
            assert (await answer(running, PROMPTS[2], 5))[0] == before

    asyncio.run(check())
    assert all(rank.alive for rank in [*gemma3_ranks.prefills, gemma3_ranks.decode])
