"""A worker killed or stopped in the middle: the other one says so, holds nothing afterwards and goes on serving."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from diptych.core.commands import Decode, Failed, Finished, FirstTokens, Prefill
from diptych.core.errors import TransferFailed, Unavailable
from diptych.core.fleet import Phase
from diptych.core.request import new_attempt_id
from diptych.core.stages import Stage
from e2e_harness import Rank, Workers, attached, rank_spec, ranks, request

LEASE_S = 1.0


@pytest.fixture
def pair(tiny_gemma3_dir: Path, tmp_path: Path) -> Iterator[list[Rank]]:
    """Ranks of this test's own. A chunk of one block makes the prompt slow enough to be met half way."""
    specs = [rank_spec(tiny_gemma3_dir, phase, f"{phase}-0", chunk_tokens=16, lease_s=LEASE_S) for phase in (Phase.PREFILL, Phase.DECODE)]
    with ranks(tmp_path, *specs) as started:
        yield started


def long_prompt(number: int = 0) -> list[int]:
    order = random.Random(number)
    return [2, *(order.randrange(3, 512) for _ in range(899))]


async def reached(rank: Rank, stage: Stage, attempt_id: str) -> None:
    """Wait until the rank's log stamps `stage`."""
    async with asyncio.timeout(20):
        while stage not in rank.stamps(attempt_id):  # noqa: ASYNC110 - another process's log tells nobody that it grows
            await asyncio.sleep(0.002)


async def begin(workers: Workers, number: int = 0) -> str:
    attempt_id = new_attempt_id()
    asked = request(long_prompt(number), max_tokens=50)
    assert workers.prefill is not None
    assert workers.decode is not None
    workers.decode.send(Decode(attempt_id, asked))
    workers.prefill.send(Prefill(attempt_id, asked, workers.decode_address))
    return attempt_id


def test_prefill_worker_killed_in_the_middle_of_a_transfer(pair: list[Rank]) -> None:
    prefill, decode = pair

    async def main() -> None:
        async with attached(prefill, decode) as workers:
            attempt_id = await begin(workers)
            await reached(decode, Stage.GRANTED, attempt_id)
            prefill.kill()
            assert workers.decode is not None
            events = await workers.decode.until_terminal(attempt_id)
            assert Stage.COMMITTED not in decode.stamps(attempt_id), "the kill came too late to test anything"
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, TransferFailed)
            with pytest.raises(Unavailable):
                await _drained(workers, attempt_id)
        async with attached(None, decode) as workers:
            await workers.idle()
            answer = await workers.local(request(long_prompt(), max_tokens=5))
            assert len(answer.tokens) == 5
            await workers.idle()

    asyncio.run(main())


async def _drained(workers: Workers, attempt_id: str) -> None:
    assert workers.prefill is not None
    await workers.prefill.until_terminal(attempt_id)


def test_decode_worker_killed_in_the_middle_of_a_transfer(pair: list[Rank]) -> None:
    prefill, decode = pair

    async def main() -> None:
        async with attached(prefill, decode) as workers:
            attempt_id = await begin(workers)
            await reached(decode, Stage.GRANTED, attempt_id)
            decode.kill()
            assert workers.prefill is not None
            events = await workers.prefill.until_terminal(attempt_id)
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, TransferFailed)
        async with attached(prefill, None) as workers:
            await workers.idle()
            answer = await workers.prefill_only(request(long_prompt(), max_tokens=1))
            assert len(answer.tokens) == 1
            assert answer.first is not None
            assert answer.first.cached_tokens > 0, "what was computed before the kill is found again"
            await workers.idle()

    asyncio.run(main())


def test_prefill_worker_stopped_in_the_middle_is_given_up_after_a_lease(pair: list[Rank]) -> None:
    prefill, decode = pair

    async def main() -> None:
        async with attached(prefill, decode) as workers:
            attempt_id = await begin(workers)
            await reached(decode, Stage.GRANTED, attempt_id)
            prefill.process.send_signal(signal.SIGSTOP)
            assert workers.decode is not None
            events = await workers.decode.until_terminal(attempt_id)
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, TransferFailed)
            local = await workers.local(request(long_prompt(1), max_tokens=5))
            assert len(local.tokens) == 5
            prefill.process.send_signal(signal.SIGCONT)
            assert workers.prefill is not None
            assert isinstance((await workers.prefill.until_terminal(attempt_id))[-1], Failed)
            await workers.idle()
            again = await workers.disaggregated(request(long_prompt(1), max_tokens=5))
            assert again.tokens == local.tokens
            await workers.idle()

    asyncio.run(main())


def test_decode_worker_stopped_before_the_commit_is_given_up_after_a_lease(pair: list[Rank]) -> None:
    prefill, decode = pair

    async def main() -> None:
        async with attached(prefill, decode) as workers:
            attempt_id = await begin(workers)
            await reached(prefill, Stage.GRANTED, attempt_id)  # else only the lane's end would tell P, after 15 s
            decode.process.send_signal(signal.SIGSTOP)
            assert workers.prefill is not None
            events = await workers.prefill.until_terminal(attempt_id)
            assert isinstance(events[0], FirstTokens)
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, TransferFailed)
            decode.process.send_signal(signal.SIGCONT)
            assert workers.decode is not None
            last = (await workers.decode.until_terminal(attempt_id))[-1]
            assert isinstance(last, Failed | Finished)
            await workers.idle()

    asyncio.run(main())


def test_workers_that_come_back_are_other_incarnations_and_serve(pair: list[Rank]) -> None:
    async def ask(prefill: Rank, decode: Rank) -> tuple[int, ...]:
        async with attached(prefill, decode) as workers:
            answer = await workers.disaggregated(request(long_prompt(2), max_tokens=6))
            assert answer.error is None
            await workers.idle()
            return answer.tokens

    prefill, decode = pair
    before = asyncio.run(ask(prefill, decode))
    prefill.kill()
    with ranks(prefill.log.parent, prefill.spec) as (again,):
        assert again.wait_for("ready")["incarnation"] != prefill.wait_for("ready")["incarnation"]
        assert asyncio.run(ask(again, decode)) == before
        decode.kill()
        with ranks(decode.log.parent, decode.spec) as (other,):
            assert asyncio.run(ask(again, other)) == before


def test_nothing_is_left_when_all_are_killed_in_the_middle(pair: list[Rank]) -> None:
    before = set(os.listdir("/dev/shm"))
    sockets = [_ours(rank) for rank in pair]
    assert all(sockets), "each rank listens on an abstract socket of its pool"

    async def main() -> None:
        async with attached(*pair) as workers:
            attempt_id = await begin(workers)
            await reached(pair[1], Stage.GRANTED, attempt_id)
            for rank in pair:
                rank.process.kill()
            assert workers.prefill is not None
            with pytest.raises(Unavailable):
                await workers.prefill.until_terminal(attempt_id)

    asyncio.run(main())
    for rank in pair:
        rank.kill()
    assert set(os.listdir("/dev/shm")) <= before
    left = Path("/proc/net/unix").read_text()
    assert not [name for names in sockets for name in names if name in left]
    for rank in pair:
        assert not Path(f"/proc/{rank.process.pid}").exists()


def _ours(rank: Rank) -> list[str]:
    """Names of the Unix sockets the process has, from /proc."""
    inodes = {os.readlink(fd).split("[")[-1].rstrip("]") for fd in _links(rank) if "socket:" in os.readlink(fd)}
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return [fields[7] for fields in lines if len(fields) > 7 and fields[6] in inodes]


def _links(rank: Rank) -> list[Path]:

    return [entry for entry in Path(f"/proc/{rank.process.pid}/fd").iterdir() if entry.is_symlink()]
