"""A request may be given up in any stage, by command or by a router that goes away: nothing hangs, nothing is kept."""

from __future__ import annotations

import asyncio
import random

import pytest
from diptych.core.commands import Decode, Failed, FirstTokens, HandedOver, NewTokens, Prefill, Stop
from diptych.core.errors import Cancelled, ContextExceeded, InvalidRequest
from diptych.core.request import FinishReason, new_attempt_id
from e2e_harness import Family, Workers, attached, request

LONG = tuple(3 + i % 500 for i in range(900))


def distinct(number: int, length: int = 900) -> list[int]:
    """A long prompt that shares no block with another number's."""
    order = random.Random(f"stop {number}")
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


async def usable(workers: Workers) -> None:
    """After all that: idle, books right, and the next request is served."""
    await workers.idle()
    answer = await workers.disaggregated(request(range(2, 40), max_tokens=4))
    assert answer.error is None
    assert len(answer.tokens) == 4
    await workers.idle()


def test_stopped_while_waiting_for_the_other_side(gemma3_ranks: Family) -> None:
    async def main() -> None:
        async with attached(gemma3_ranks.prefills[0], gemma3_ranks.decode) as workers:
            prefill, decode = workers.prefill, workers.decode
            assert prefill is not None
            assert decode is not None
            # D waits for an Offer that never comes.
            lonely = new_attempt_id()
            decode.send(Decode(lonely, request(distinct(1))))
            decode.send(Stop(lonely))
            (event,) = await decode.until_terminal(lonely)
            assert isinstance(event, Failed)
            assert isinstance(event.error, Cancelled)
            # P offers what D was never told of, and is stopped while it waits.
            unasked = new_attempt_id()
            prefill.send(Prefill(unasked, request(distinct(2)), workers.decode_address))
            assert isinstance(await prefill.next(unasked), FirstTokens)
            prefill.send(Stop(unasked))
            assert isinstance(await prefill.next(unasked), Failed)
            await usable(workers)

    asyncio.run(main())


def test_stopped_in_every_stage_of_the_prompt(gemma3_ranks: Family) -> None:
    async def main() -> None:
        async with attached(gemma3_ranks.prefills[0], gemma3_ranks.decode) as workers:
            prefill, decode = workers.prefill, workers.decode
            assert prefill is not None
            assert decode is not None
            ids = [new_attempt_id() for _ in range(4)]
            for number, attempt_id in enumerate(ids):  # the later ones are queued behind the first, which is written for a second and more
                asked = request(distinct(10 + number, 600), max_tokens=420 if number == 0 else 50)
                decode.send(Decode(attempt_id, asked))
                prefill.send(Prefill(attempt_id, asked, workers.decode_address))
            prefill.send(Stop(ids[2]))
            events = await prefill.until_terminal(ids[2])
            assert isinstance(events[-1], Failed)
            assert [type(event) for event in await prefill.until_terminal(ids[0])] == [FirstTokens, HandedOver]
            decode.send(Stop(ids[1]))  # now being computed at P, granted by D
            assert isinstance((await decode.until_terminal(ids[1]))[-1], Failed)
            assert isinstance((await prefill.until_terminal(ids[1]))[-1], Failed)
            assert isinstance(await decode.next(ids[0]), NewTokens)
            decode.send(Stop(ids[0]))
            assert isinstance((await decode.until_terminal(ids[0]))[-1], Failed)
            decode.send(Stop(ids[2]))
            assert isinstance((await decode.until_terminal(ids[2]))[-1], Failed)
            assert [type(event) for event in await prefill.until_terminal(ids[3])] == [FirstTokens, HandedOver]
            assert not isinstance((await decode.until_terminal(ids[3]))[-1], Failed)
            await usable(workers)

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(4))
def test_stopped_at_random_on_random_sides(family: Family, seed: int) -> None:
    order = random.Random(seed)

    async def one(workers: Workers, number: int) -> None:
        attempt_id = new_attempt_id()
        asked = request(distinct(number, order.randrange(1, 600)), max_tokens=order.randrange(1, 60))
        task = asyncio.create_task(workers.disaggregated(asked, attempt_id) if order.random() < 0.7 else workers.local(asked, attempt_id))
        await asyncio.sleep(order.random() * 0.4)
        for stream in order.sample([workers.prefill, workers.decode], order.choice([1, 2])):
            assert stream is not None
            stream.send(Stop(attempt_id))
        await task  # every attempt has one terminal event on each side, or this would not return

    async def main() -> None:
        async with attached(order.choice(family.prefills), family.decode) as workers:
            await asyncio.gather(*(one(workers, 1000 * seed + i) for i in range(12)))
            await usable(workers)

    asyncio.run(main())


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.4])
def test_a_router_that_goes_away_takes_everything_along(gemma3_ranks: Family, after_s: float) -> None:
    async def main() -> None:
        async with attached(gemma3_ranks.prefills[0], gemma3_ranks.decode) as workers:
            tasks = []
            for number in range(5):
                asked = request(distinct(50 + number), max_tokens=100)
                tasks.append(asyncio.create_task(workers.disaggregated(asked) if number % 2 else workers.local(asked)))
            await asyncio.sleep(after_s)
            for task in tasks:
                task.cancel()
        async with attached(gemma3_ranks.prefills[0], gemma3_ranks.decode) as workers:
            await usable(workers)

    asyncio.run(main())


def test_what_can_never_be_served_is_refused_by_name(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            refused = [
                (request([]), InvalidRequest, "prompt"),
                (request([2, 512]), InvalidRequest, "prompt"),
                (request(LONG * 2), ContextExceeded, None),
                (request([2, 3], max_tokens=0), InvalidRequest, "max_tokens"),
                (request([2, 3], temperature=-1.0), InvalidRequest, "temperature"),
                (request([2, 3], top_p=0.0), InvalidRequest, "top_p"),
                (request([2, 3], stop_token_ids=(9999,)), InvalidRequest, "stop_token_ids"),
                (request([2, 3], temperature=1.0), InvalidRequest, "seed"),
                (request([2, 3], max_tokens=2, generated=(5, 6)), InvalidRequest, "max_tokens"),
            ]
            for asked, kind, field in refused:
                answer = await workers.local(asked)
                assert type(answer.error) is kind, asked
                if field is not None:
                    assert answer.error.field == field
                assert (await workers.disaggregated(asked)).error is not None
            await usable(workers)

    asyncio.run(main())


def test_the_end_of_the_context_ends_the_answer(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            answers = [await path(request(LONG, max_tokens=1000)) for path in (workers.local, workers.disaggregated)]
            for answer in answers:
                assert answer.finish is FinishReason.LENGTH
                assert answer.tokens == answers[0].tokens
                assert len(answer.tokens) == 1024 - len(LONG)
            await usable(workers)

    asyncio.run(main())


def test_a_command_for_the_other_phase_is_refused(gemma3_ranks: Family) -> None:
    async def main() -> None:
        async with attached(gemma3_ranks.prefills[0], gemma3_ranks.decode) as workers:
            assert workers.prefill is not None
            assert workers.decode is not None
            attempt_id = new_attempt_id()
            workers.decode.send(Prefill(attempt_id, request([2, 3]), None))
            workers.prefill.send(Decode(attempt_id, request([2, 3])))
            for stream in (workers.prefill, workers.decode):
                (event,) = await stream.until_terminal(attempt_id)
                assert isinstance(event, Failed)
                assert isinstance(event.error, InvalidRequest)
            await usable(workers)

    asyncio.run(main())
