"""Several choices per request over HTTP, through the router and real ranks: the same texts streamed and whole, on either path, cut by
stop strings, squeezed through a small worker, and after a decode worker has died."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
from diptych.client.aio import AsyncClient
from diptych.core.fleet import LocalPrefill, Phase
from e2e_harness import Family, Rank, rank_spec
from pausing import arm, start, stopped
from router_harness import idle, router

PROMPTS = ["the man in the inn " * n for n in (2, 4, 9)]
Texts = list[tuple[str, str]]
"""Text and finish reason of each choice."""


def client(http: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0)


async def whole(web: openai.AsyncOpenAI, prompt: str, **options: Any) -> Texts:
    answer = await web.completions.create(model="", prompt=prompt, **options)
    assert [choice.index for choice in answer.choices] == list(range(options["n"]))
    return [(choice.text, str(choice.finish_reason)) for choice in answer.choices]


async def streamed(web: openai.AsyncOpenAI, prompt: str, **options: Any) -> Texts:
    stream = await web.completions.create(model="", prompt=prompt, stream=True, **options)
    texts: dict[int, list[str]] = {choice: [] for choice in range(options["n"])}
    reasons: dict[int, list[str]] = {choice: [] for choice in texts}
    async for event in stream:
        for choice in event.choices:
            assert not reasons[choice.index], "nothing comes behind the end of a choice"
            texts[choice.index].append(choice.text)
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert all(len(given) == 1 for given in reasons.values())
    return [("".join(texts[choice]), reasons[choice][0]) for choice in sorted(texts)]


def asked(**options: Any) -> dict[str, Any]:
    return {"n": 3, "max_tokens": 24, "seed": 5, **options}


async def answers(workers: Sequence[Rank], policy: LocalPrefill) -> list[Texts]:
    async with router(workers, policy) as running, client(running.http) as web:
        texts: list[Texts] = []
        for prompt in PROMPTS:
            one, other = await asyncio.gather(whole(web, prompt, **asked()), streamed(web, prompt, **asked()))
            assert one == other
            assert len({text for text, _ in one}) == 3, "choices draw their own noise"
            ((first, _),) = await whole(web, prompt, **asked(n=1))
            assert first == one[0][0]
            stop = one[1][0][3:8]
            cut = await streamed(web, prompt, **asked(stop=stop))
            assert cut == [(text.partition(stop)[0], "stop" if stop in text else reason) for text, reason in one]
            assert cut[1][1] == "stop"
            texts += [one, cut]
        await idle(running)
        return texts


def test_the_same_choices_streamed_and_whole_on_every_path(family: Family) -> None:
    workers = [*family.prefills, family.decode]
    apart, alone = (asyncio.run(answers(workers, policy)) for policy in (LocalPrefill.NEVER, LocalPrefill.ALWAYS))
    assert apart == alone


def test_more_choices_than_a_worker_runs_at_once(gemma3_ranks: Family) -> None:
    """The decode worker runs 8 sequences and holds 1,024 tokens; 16 choices of 60 tokens, with three times 4 beside them, need 1,680."""

    async def check() -> None:
        async with router([*gemma3_ranks.prefills, gemma3_ranks.decode]) as running, AsyncClient(running.grpc) as c:
            many, *others = await asyncio.gather(
                c.generate(PROMPTS[2], n=16, max_tokens=60, seed=3, ignore_eos=True),
                *(c.generate(PROMPTS[2], n=4, max_tokens=60, seed=3, ignore_eos=True) for _ in range(3)),
            )
            assert [len(choice.tokens) for choice in many.choices] == [60] * 16
            assert many.usage.output_tokens == 960
            for other in others:
                assert [choice.text for choice in other.choices] == [choice.text for choice in many.choices[:4]]
            await idle(running)

    asyncio.run(check())


def test_a_decode_worker_dies_under_several_choices(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """It stops itself in the middle, so that it is under way when it dies, whoever is faster."""
    names = [("p0", Phase.PREFILL), ("d0", Phase.DECODE), ("d1", Phase.DECODE)]
    options: Any = {"n": 4, "max_tokens": 90, "seed": 7, "ignore_eos": True}

    async def check(started: list[Rank]) -> None:
        async with router(started) as running, AsyncClient(running.grpc) as c:
            expected = [[choice.text for choice in (await c.generate(prompt, **options)).choices] for prompt in PROMPTS]
            arm(tmp_path, "step", 20)
            under_way = [asyncio.create_task(c.generate(prompt, **options)) for prompt in PROMPTS]
            (await stopped(started)).kill()
            again = await asyncio.gather(*under_way)
            assert [[choice.text for choice in answer.choices] for answer in again] == expected
            assert max(answer.timing.attempts for answer in again) == 2
            await idle(running)

    started = [start(rank_spec(tiny_llama_dir, phase, name, kv_tokens=2048, max_running=12), tmp_path) for name, phase in names]
    try:
        asyncio.run(check(started))
    finally:
        for rank in started:
            rank.kill()
