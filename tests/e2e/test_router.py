"""The router over real ranks: same answers on every path, through cancels and through the death of a worker."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import openai
import pytest
from diptych.core.fleet import LocalPrefill, Phase
from diptych.core.generate import Generate, Timing
from diptych.core.sampling import SamplingParams
from diptych.router.server import Router
from e2e_harness import Family, Rank, rank_spec, ranks
from router_harness import idle, router, until

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


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_worker_killed_in_the_middle_changes_no_answer(tiny_llama_dir: Path, tmp_path: Path, victim: str) -> None:
    names = [("p0", Phase.PREFILL), ("p1", Phase.PREFILL), ("d0", Phase.DECODE), ("d1", Phase.DECODE)]

    async def check(started: list[Rank]) -> None:
        async with router(started, LocalPrefill.AUTO) as running:
            jobs = [(prompt, seed) for prompt in PROMPTS[1:] for seed in range(4)]
            expected = [await answer(running, *job, max_tokens=80) for job in jobs[:3]]
            asked = [asyncio.create_task(answer(running, *job, max_tokens=80)) for job in jobs]
            dead = next(rank for rank in started if rank.spec.worker_id == victim)
            await until(running, lambda: any(r.running for r in running.fleet.describe()[1] if r.worker_id == victim))
            dead.kill()
            answers = await asyncio.gather(*asked)
            assert [text for text, _ in answers[:3]] == [text for text, _ in expected]
            assert max(timing.attempts for _, timing in answers) == 2
            again = [await answer(running, *job, max_tokens=80) for job in jobs]
            assert [text for text, _ in again] == [text for text, _ in answers]
            await idle(running)

    with ranks(tmp_path, *(rank_spec(tiny_llama_dir, phase, name, kv_tokens=2048) for name, phase in names)) as started:
        asyncio.run(check(started))
