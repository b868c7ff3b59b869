"""Several choices of one request over real ranks: each is what it would be alone, whatever the path, the memory and the neighbours."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diptych.core.commands import ChoiceFinished, Decode, Finished, NewTokens, Stop
from diptych.core.fleet import Phase
from diptych.core.request import FinishReason, Request, new_attempt_id
from e2e_harness import Answer, Family, Workers, attached, rank_spec, ranks, request

SEEDED: dict[str, Any] = {"temperature": 1.1, "seed": 3}
PENALISED: dict[str, Any] = {"temperature": 0.8, "seed": 8, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3}
ENDING: dict[str, Any] = {**SEEDED, "ignore_eos": False, "min_tokens": 3, "stop_token_ids": tuple(range(100, 140)), "min_p": 0.01}
SAMPLINGS = pytest.mark.parametrize("sampling", [{}, SEEDED, PENALISED, ENDING], ids=["greedy", "seeded", "penalised", "ending"])
LENGTHS = (15, 16, 17, 33, 80)
"""Around the borders of a block of 16; the window of the tiny Gemma is 24, so that 33 and 80 leave blocks behind."""


def prompt(length: int, seed: int) -> list[int]:
    order = random.Random(f"choices {length} {seed}")
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


def same(answers: list[Answer]) -> None:
    """Every choice equal, none failed, log probabilities within what fp32 leaves open."""
    for answer in answers:
        assert answer.error is None
        assert answer.choices.keys() == answers[0].choices.keys()
        for choice, written in answer.choices.items():
            first = answers[0].choices[choice]
            assert (written.tokens, written.finish) == (first.tokens, first.finish)
            assert written.finish is not None
            for ours, theirs in zip(written.logprobs, first.logprobs, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-3)


def only(asked: Request, choice: int) -> Request:
    """That choice and no other."""
    return replace(asked, finished=frozenset(range(asked.sampling.n)) - {choice})


@SAMPLINGS
def test_every_choice_is_the_same_on_every_path(family: Family, sampling: dict[str, Any]) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as small, attached(family.prefills[1], family.decode) as large:
            for length in LENGTHS:
                asked = request(prompt(length, 1 + len(sampling)), max_tokens=20, logprobs=2, n=4, **sampling)
                answers = [await small.disaggregated(asked), await large.disaggregated(asked), await large.local(asked)]
                same(answers)
                written = answers[0].choices
                if sampling:
                    assert len({each.tokens for each in written.values()}) == 4, "choices draw their own noise"
                one = await large.local(replace(asked, sampling=replace(asked.sampling, n=1)))
                assert (one.tokens, one.finish) == (written[0].tokens, written[0].finish)
                for choice in (1, 3):
                    alone = await small.disaggregated(only(asked, choice))
                    assert alone.choices[choice].tokens == written[choice].tokens
                assert answers[0].handed_over is not None, "one transfer serves all choices"
            await small.idle()
            await large.idle()

    asyncio.run(main())


@pytest.mark.parametrize("path", ["disaggregated", "local"])
def test_a_retry_goes_on_where_each_choice_stopped(family: Family, path: str) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            for length in (16, 33):
                asked = request(prompt(length, 7), max_tokens=40, n=4, **PENALISED)
                whole = (await workers.local(asked)).choices
                had = (whole[0].tokens[:18], (), whole[2].tokens[:1], whole[3].tokens)
                again = await getattr(workers, path)(replace(asked, generated=had, finished=frozenset({3})))
                assert again.error is None
                assert [again.choices[choice].tokens for choice in (0, 1, 2)] == [
                    whole[choice].tokens[len(had[choice]) :] for choice in (0, 1, 2)
                ]
                none_opens = await getattr(workers, path)(replace(asked, generated=tuple(whole[choice].tokens[:3] for choice in range(4))))
                assert [written.tokens for written in none_opens.choices.values()] == [written.tokens[3:] for written in whole.values()]
            await workers.idle()

    asyncio.run(main())


def test_a_choice_may_end_by_itself_at_any_time(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            asked = request(prompt(40, 9), max_tokens=24, n=3, **SEEDED)
            whole = (await workers.local(asked)).choices
            stops = (whole[0].tokens[0], whole[1].tokens[5])
            stopped = replace(asked, sampling=replace(asked.sampling, stop_token_ids=stops))
            same([await workers.disaggregated(stopped), await workers.local(stopped)])
            ended = (await workers.disaggregated(stopped)).choices
            assert (ended[0].tokens, ended[0].finish) == ((), FinishReason.STOP)
            assert ended[1].tokens in [whole[1].tokens[:count] for count in range(6)]
            one = request(prompt(40, 9), max_tokens=1, n=3, **SEEDED)
            answers = [await workers.prefill_only(one), await workers.disaggregated(one), await workers.local(one)]
            same(answers)
            assert [written.tokens for written in answers[0].choices.values()] == [written.tokens[:1] for written in whole.values()]
            await workers.idle()

    asyncio.run(main())


def test_the_router_stops_one_choice_and_the_others_go_on(family: Family) -> None:
    async def main() -> None:
        async with attached(family.prefills[0], family.decode) as workers:
            asked = request(prompt(20, 11), max_tokens=200, n=3, **SEEDED)
            whole = (await workers.local(asked)).choices
            decode, attempt_id = workers.decode, new_attempt_id()
            assert decode is not None
            decode.send(Decode(attempt_id, asked, local_prefill=True))
            events = [await decode.next(attempt_id)]
            decode.send(Stop(attempt_id, 1))
            events += await decode.until_terminal(attempt_id)
            tokens = [token for event in events if isinstance(event, NewTokens) for token in event.tokens]
            ends = {event.choice for event in events if isinstance(event, ChoiceFinished)}
            assert isinstance(events[-1], Finished)
            assert ends == {0, 2}
            for choice in (0, 2):
                assert tuple(token.id for token in tokens if token.choice == choice) == whole[choice].tokens
            assert len([token for token in tokens if token.choice == 1]) < 200
            await workers.idle()

    asyncio.run(main())


async def _alone(workers: Workers, asked: Request) -> list[tuple[int, ...]]:
    return [(await workers.local(only(asked, choice))).choices[choice].tokens for choice in asked.live]


def test_choices_that_find_no_slot_or_no_block_wait_and_are_written(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """16 choices of 90 tokens in a pool of 320 and 8 slots, beside others: all of them, and right."""
    specs = (
        rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p", kv_tokens=320),
        rank_spec(tiny_gemma3_dir, Phase.DECODE, "d", kv_tokens=320, chunk_tokens=24),
    )

    async def main(one: Any, other: Any) -> None:
        async with attached(one, other) as workers:
            asked = [request(prompt(33, 20 + i), max_tokens=60, n=n, **SEEDED) for i, n in enumerate((16, 1, 3))]
            alone = [await _alone(workers, each) for each in asked]
            together = await asyncio.gather(
                workers.disaggregated(asked[0]), workers.local(asked[1]), workers.disaggregated(asked[2]), workers.local(asked[0])
            )
            for answer, expected in zip(together, [*alone, alone[0]], strict=True):
                assert answer.error is None
                assert [written.tokens for written in answer.choices.values()] == expected
            recomputed = [answer.finished.recomputed_tokens for answer in together if answer.finished is not None]
            assert sum(recomputed) > 0, "the test should need more memory than there is"
            await workers.idle()

    with ranks(tmp_path, *specs) as (one, other):
        asyncio.run(main(one, other))


def test_cancels_of_attempts_with_several_choices_leave_nothing(family: Family) -> None:
    order = random.Random(5)

    async def cancelled(workers: Workers, number: int) -> None:
        asked = request(prompt(order.randrange(1, 300), 40 + number), max_tokens=100, n=1 + number % 5, **SEEDED)
        attempt_id = new_attempt_id()
        task = asyncio.create_task(workers.disaggregated(asked, attempt_id) if number % 2 else workers.local(asked, attempt_id))
        await asyncio.sleep(order.random() * 0.3)
        for stream in (workers.prefill, workers.decode):
            assert stream is not None
            stream.send(Stop(attempt_id))
        await task  # one terminal event from each side, or this would not return

    async def main() -> None:
        async with attached(family.prefills[1], family.decode) as workers:
            await asyncio.gather(*(cancelled(workers, number) for number in range(12)))
            await workers.idle()

    asyncio.run(main())
