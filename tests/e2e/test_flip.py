"""A worker that becomes another in place: the same processes, weights and groups; role, pool, address and incarnation are new."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.process.child import DIED
from diptych.core.commands import Decode, Finished, NewTokens
from diptych.core.fleet import Phase
from diptych.core.request import new_attempt_id
from e2e_harness import Family, Rank, attached, rank_spec, ranks, request, wait_idle
from spread_harness import cases, judged, prompt, same

ENDS_S = 5.0
"""For a machine that does other things too."""


def flip(rank: Rank, worker_id: str, phase: Phase, **changes: object) -> None:
    """Returns when the worker is ready in its new role."""
    before = rank.wait_for("ready")
    rank.become(worker_id, phase, **changes)
    assert rank.wait_for("left", "failed")["event"] == "left"
    after = rank.wait_for("ready", "failed")
    assert after["event"] == "ready"
    assert after["incarnation"] != before["incarnation"]
    assert rank.alive


def test_a_prefill_worker_becomes_a_decode_worker_and_comes_back(gemma3_ranks: Family) -> None:
    """Of those that all tests of the session share: it leaves them as it found them."""
    prefill, flipping = gemma3_ranks.prefills

    async def main() -> None:
        async with attached(prefill, gemma3_ranks.decode) as workers:
            expected = await workers.disaggregated(request(prompt(90, 5)))
        flip(flipping, "d1", Phase.DECODE, kv_tokens=512)
        assert flipping.wait_for("ready")["capacity_tokens"] == 512
        async with attached(prefill, flipping) as workers:
            answer = await workers.disaggregated(request(prompt(90, 5)))
            assert (answer.error, answer.tokens) == (None, expected.tokens)
            assert answer.handed_over is not None
            counters = await wait_idle(workers.clients["d1"])
            assert dict(counters.counters)["diptych_worker_role_flips_total"] == 1
            assert workers.decode is not None
            attempt_id = new_attempt_id()
            workers.decode.send(Decode(attempt_id, request(prompt(20, 6), max_tokens=300), local_prefill=True))
            assert isinstance(await workers.decode.next(attempt_id), NewTokens)
            flipping.become("p1", Phase.PREFILL, kv_tokens=1024)  # it finishes first
            assert isinstance((await workers.decode.until_terminal(attempt_id))[-1], Finished)
        await asyncio.to_thread(flipping.wait_for, "left")
        async with attached(flipping, gemma3_ranks.decode) as workers:
            answer = await workers.disaggregated(request(prompt(90, 5)))
            assert (answer.error, answer.tokens) == (None, expected.tokens)

    asyncio.run(main())
    assert len(flipping.mapped_pools()) == 1, "those it had before are given back, and it copies from nobody's"
    assert flipping.alive


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_workers_of_many_ranks_swap_their_roles(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """Two shards and two stages, with pools that memory sizes; the one that read then writes."""
    shared: dict[str, Any] = {"kv_tokens": None, "memory_fraction": 0.05}
    specs = [
        rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p0", tp=2, **shared),
        rank_spec(tiny_gemma3_dir, Phase.DECODE, "d0", stages=(3, 1), **shared),
        rank_spec(tiny_gemma3_dir, Phase.DECODE, "judge"),
    ]
    with ranks(tmp_path, *specs) as (shards, stages, judge):
        expected = asyncio.run(judged(judge))

        async def answered(prefill: Rank, decode: Rank, tenant: str) -> None:
            async with attached(prefill, decode) as workers:
                same([await workers.disaggregated(each) for each in cases(tenant)], expected)

        asyncio.run(answered(shards, stages, "before"))
        for turn in range(2):
            flip(shards, f"d{turn + 1}", Phase.DECODE)
            flip(stages, f"p{turn + 1}", Phase.PREFILL)
            asyncio.run(answered(stages, shards, f"swapped {turn}"))
            flip(shards, f"p{turn + 3}", Phase.PREFILL)
            flip(stages, f"d{turn + 3}", Phase.DECODE)
        asyncio.run(answered(shards, stages, "swapped back"))
        assert [len(rank.mapped_pools()) for rank in shards.members] == [1, 1]
        assert [worker.stop() for worker in (shards, stages)] == [0, 0]
        assert "Traceback" not in shards.logs() + stages.logs()


@pytest.mark.nightly
def test_a_leader_that_is_killed_while_its_worker_changes_its_role_ends_it(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    with ranks(tmp_path, rank_spec(tiny_gemma3_dir, Phase.PREFILL, "p0", tp=2)) as (worker,):
        (follower,) = worker.followers
        follower.process.send_signal(signal.SIGSTOP)  # so the leader cannot be done before it is killed
        worker.become("d0", Phase.DECODE)
        worker.process.kill()
        follower.process.send_signal(signal.SIGCONT)
        assert follower.ended(ENDS_S) == DIED
        assert "ost rank 0 of" in follower.log.read_text()
