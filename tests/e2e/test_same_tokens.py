"""Whatever the path, the same tokens: disaggregated over any chunk size, read locally, from a prefix, resumed, beside others."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from diptych.core.commands import Stop
from diptych.core.errors import Cancelled
from diptych.core.request import FinishReason, Request, new_attempt_id
from e2e_harness import Answer, Family, Workers, attached, request

SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}
PENALISED: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.4,
    "logit_bias": ((7, 3.0), (9, -9.0)),
}
EVERYTHING: dict[str, Any] = {**PENALISED, "temperature": 1.1, "min_p": 0.02, "seed": 5, "min_tokens": 9, "ignore_eos": False}
SAMPLINGS = pytest.mark.parametrize("sampling", [{}, SEEDED, PENALISED, EVERYTHING], ids=["greedy", "seeded", "penalised", "everything"])
LENGTHS = (1, 15, 16, 17, 40, 100, 333)


def prompt(length: int, seed: int) -> list[int]:
    order = random.Random(f"{length} {seed}")
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


def same(answers: list[Answer]) -> None:
    """All equal, none failed, log probabilities within what fp32 leaves open."""
    for answer in answers:
        assert answer.error is None
        assert answer.tokens == answers[0].tokens
        assert answer.finish is answers[0].finish
        for ours, first in zip(answer.logprobs, answers[0].logprobs, strict=True):
            assert ours == pytest.approx(first, abs=1e-3)


@SAMPLINGS
def test_every_path_writes_the_same_tokens(family: Family, sampling: dict[str, Any]) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as small, attached(family.prefills[1], family.decode) as large:
            for length in LENGTHS:
                # The seed of the prompt makes it new to both prefill workers; D meets it three times, at last from its prefix cache.
                asked = request(prompt(length, 1 + len(sampling)), max_tokens=12, logprobs=2, **sampling)
                answers = [await small.disaggregated(asked), await large.disaggregated(asked), await large.local(asked)]
                same(answers)
                assert len(answers[0].tokens) == 12
                assert answers[0].handed_over is not None
                assert answers[0].handed_over.transport == "shm"
            await small.idle()
            await large.idle()

    asyncio.run(main())


def test_only_what_the_destination_lacks_is_moved_and_all_of_it_once(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            ids = prompt(200, 5)
            cold = await workers.disaggregated(request(ids, max_tokens=4))
            again = await workers.disaggregated(request(ids, max_tokens=4))
            longer = await workers.disaggregated(request([*ids, *prompt(40, 6)], max_tokens=4))
            local = await workers.local(request([*ids, *prompt(40, 6)], max_tokens=4))
            same([cold, again])
            same([longer, local])
            layout = family.decode.wait_for("ready")["layout"]
            assert cold.handed_over is not None
            assert cold.handed_over.kv_bytes == _bytes_to_move(layout, 200, 0)
            assert again.handed_over is not None
            assert again.handed_over.kv_bytes == _bytes_to_move(layout, 200, 192)
            assert longer.handed_over is not None
            assert longer.handed_over.kv_bytes == _bytes_to_move(layout, 240, 192)
            assert again.first is not None
            assert again.first.cached_tokens == 192
            await workers.idle()

    asyncio.run(main())


def _bytes_to_move(layout: Any, tokens: int, cached: int) -> int:
    """Bytes of every position the destination lacks: in a window group those from the block on where the next query's window begins."""
    total = 0
    for group in layout["groups"]:
        itemsize = 4 if group["dtype"] == "float32" else 2
        first = cached
        if group["window"]:
            first = max(cached, max(0, tokens - group["window"] + 1) // 16 * 16)
        total += (tokens - first) * 2 * group["kv_heads"] * group["head_dim"] * itemsize * len(group["layers"])
    return total


@SAMPLINGS
def test_a_resumed_request_goes_on_where_it_stopped(family: Family, sampling: dict[str, Any]) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            ids = prompt(50, 7)
            whole = await workers.local(request(ids, max_tokens=20, **sampling))
            for done in (1, 7, 19):
                asked = request(ids, max_tokens=20, generated=whole.tokens[:done], **sampling)
                assert (await workers.local(asked)).tokens == whole.tokens[done:]
                assert (await workers.disaggregated(asked)).tokens == whole.tokens[done:]
            await workers.idle()

    asyncio.run(main())


def test_neighbours_and_their_cancels_change_nothing(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            asked = [request(prompt(10 + 23 * i, 100 + i), max_tokens=16, **(SEEDED if i % 2 else {})) for i in range(10)]
            alone = [await workers.local(each) for each in asked]
            order = random.Random(3)
            for _ in range(2):
                ids = [new_attempt_id() for _ in asked]
                paths = [workers.disaggregated if order.random() < 0.6 else workers.local for _ in asked]
                neighbours = [asyncio.create_task(_cancelled(workers, order.random() * 0.1, i)) for i in range(10)]
                together = await asyncio.gather(*(path(each, i) for path, each, i in zip(paths, asked, ids, strict=True)))
                assert any(await asyncio.gather(*neighbours))
                for one, other in zip(alone, together, strict=True):
                    assert other.error is None
                    assert one.tokens == other.tokens
            await workers.idle()

    asyncio.run(main())


async def _cancelled(workers: Workers, after_s: float, i: int) -> bool:
    """A request that shares the others' prefixes and is stopped at some moment; whether it was still under way."""
    asked: Request = request(prompt(10 + 23 * i, 100 + i), max_tokens=200)
    attempt_id = new_attempt_id()
    task = asyncio.create_task(workers.disaggregated(asked, attempt_id) if i % 2 else workers.local(asked, attempt_id))
    await asyncio.sleep(after_s)
    for stream in (workers.prefill, workers.decode):
        assert stream is not None
        stream.send(Stop(attempt_id))
    answer = await task
    assert answer.error is None or isinstance(answer.error, Cancelled)
    return answer.error is not None


def test_the_first_token_may_be_the_last(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            ids = prompt(60, 9)
            whole = await workers.local(request(ids, max_tokens=3))
            one = await workers.disaggregated(request(ids, max_tokens=1))
            assert (one.tokens, one.finish) == (whole.tokens[:1], FinishReason.LENGTH)
            alone = await workers.prefill_only(request(ids, max_tokens=1))
            assert (alone.tokens, alone.finish) == (whole.tokens[:1], FinishReason.LENGTH)
            stopped = await workers.disaggregated(request(ids, max_tokens=3, stop_token_ids=whole.tokens[:1]))
            assert (stopped.tokens, stopped.finish) == ((), FinishReason.STOP)
            second = whole.tokens[1]
            if second != whole.tokens[0]:
                later = await workers.disaggregated(request(ids, max_tokens=3, stop_token_ids=(second,)))
                assert (later.tokens, later.finish) == (whole.tokens[:1], FinishReason.STOP)
            await workers.idle()

    asyncio.run(main())
