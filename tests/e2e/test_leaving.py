"""A prefill worker changes its role while the decode worker is too busy to take what it has read: it does not wait for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from diptych.cluster.doctor import links
from diptych.cluster.process.spec import RankSpec
from diptych.core.commands import Decode, Failed, NewTokens, Stop
from diptych.core.fleet import Fleet, LocalPrefill, Phase
from diptych.core.generate import Generate, Timing
from diptych.core.request import new_attempt_id
from diptych.core.sampling import SamplingParams
from diptych.router.server import Router
from diptych.rpc.worker import WorkerClient
from e2e_harness import Rank, Stream, rank_spec, ranks, request, wait_idle
from router_harness import idle, member, router, until
from spread_harness import prompt

REQUESTS = 8
HOGS = 100
"""Answers of 400 tokens, one after the other, that have the decode worker's only slot: a minute and more."""


async def answered(running: Router, ids: tuple[int, ...], began: asyncio.Event | None = None) -> tuple[list[int], Timing]:
    """Tokens of a greedy answer; `began` is set when the first is there."""
    tokens: list[int] = []
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    finish = None
    async for chunk in running.service.generate(Generate(ids, sampling=sampling)):
        assert [token.index for token in chunk.tokens] == list(range(len(tokens), len(tokens) + len(chunk.tokens)))
        tokens += [token.id for token in chunk.tokens]
        finish = chunk.finish
        if tokens and began is not None:
            began.set()
    assert finish is not None
    return tokens, finish.timing


@asynccontextmanager
async def busy(decode: Rank) -> AsyncIterator[Stream]:
    """Its slot is taken, and who comes now has to wait until this ends."""
    async with WorkerClient(decode.address) as client:
        stream = Stream(client.attach())
        hogs = [new_attempt_id() for _ in range(HOGS)]
        for number, attempt_id in enumerate(hogs):
            stream.send(Decode(attempt_id, request(prompt(20, 100 + number), max_tokens=400), local_prefill=True))
        assert isinstance(await stream.next(hogs[0]), NewTokens)
        try:
            yield stream
            for attempt_id in hogs:
                stream.send(Stop(attempt_id))
            ends = [(await stream.until_terminal(attempt_id))[-1] for attempt_id in hogs]
            assert isinstance(ends[-1], Failed), "it was no longer busy"
        finally:
            await stream.close()


def specs(model: Path) -> list[RankSpec]:
    return [
        rank_spec(model, Phase.PREFILL, "p0", drain_s=300.0),
        rank_spec(model, Phase.PREFILL, "p1"),
        rank_spec(model, Phase.DECODE, "d0", max_running=1),
    ]


async def asked_while_busy(running: Router) -> list[asyncio.Task[tuple[list[int], Timing]]]:
    """Each has its first token, and nobody writes the others."""
    began = [asyncio.Event() for _ in range(REQUESTS)]
    asked = [asyncio.create_task(answered(running, tuple(prompt(40 + number, number)), each)) for number, each in enumerate(began)]
    await asyncio.gather(*(each.wait() for each in began))
    return asked


def test_a_link_to_a_worker_without_memory_is_not_called_broken(
    tiny_gemma3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "SOON_S", 0.5)  # whatever it is: others wait there

    async def main(reads: Rank, decode: Rank) -> None:
        async with router([reads, decode]) as running:
            async with busy(decode):
                asked = await asked_while_busy(running)
                (link,) = await links.try_links([member(reads), member(decode)], None)
                assert link.busy
                assert link.works
            await asyncio.gather(*asked)
        (link,) = await links.try_links([member(reads), member(decode)], None)
        assert link.kv_bytes

    with ranks(tmp_path, *specs(tiny_gemma3_dir)[1:]) as (reads, decode):
        asyncio.run(main(reads, decode))


def test_a_worker_that_changes_its_role_does_not_wait_for_a_busy_decode_worker(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    async def main(leaves: Rank, stays: Rank, decode: Rank) -> None:
        async with router([leaves, stays, decode]) as running:
            async with busy(decode):
                asked = await asked_while_busy(running)
                leaves.become("d1", Phase.DECODE)
                await asyncio.to_thread(leaves.wait_for, "left")
                assert not any(each.done() for each in asked), "nothing was handed over meanwhile"
                await asyncio.to_thread(leaves.wait_for, "ready")
                running.fleet.publish(Fleet(2, tuple(member(rank) for rank in (stays, leaves, decode))))
                await until(running, lambda: sum(each.done() for each in asked) == REQUESTS // 2)
            answers = await asyncio.gather(*asked)
            assert {timing.prefill_worker for _, timing in answers} == {"p1"}
            assert sorted(timing.decode_worker for _, timing in answers) == ["d0"] * (REQUESTS // 2) + ["d1"] * (REQUESTS // 2)
            again = [await answered(running, tuple(prompt(40 + number, number))) for number in range(REQUESTS)]
            assert [tokens for tokens, _ in again] == [tokens for tokens, _ in answers]
            await idle(running)
        assert "unfinished" not in leaves.logs()

    with ranks(tmp_path, *specs(tiny_gemma3_dir)) as (leaves, stays, decode):
        asyncio.run(main(leaves, stays, decode))
        assert all(rank.alive for rank in (leaves, stays, decode))


@pytest.mark.parametrize("victim", ["p0", "p1"])
def test_a_worker_killed_while_one_leaves_fails_no_request(tiny_gemma3_dir: Path, tmp_path: Path, victim: str) -> None:
    """Either the one that leaves, or the one that is to read its prompts again."""

    async def main(leaves: Rank, stays: Rank, decode: Rank) -> None:
        async with router([leaves, stays, decode], LocalPrefill.AUTO) as running:
            async with busy(decode):
                asked = await asked_while_busy(running)
                leaves.become("d1", Phase.DECODE)
                {"p0": leaves, "p1": stays}[victim].process.kill()
            answers = await asyncio.gather(*asked)
            assert {len(tokens) for tokens, _ in answers} == {6}
            again = [await answered(running, tuple(prompt(40 + number, number))) for number in range(REQUESTS)]
            assert [tokens for tokens, _ in again] == [tokens for tokens, _ in answers]
        async with WorkerClient(decode.address) as client:
            await wait_idle(client)

    with ranks(tmp_path, *specs(tiny_gemma3_dir)) as (leaves, stays, decode):
        asyncio.run(main(leaves, stays, decode))
