"""A rank that is lost ends its worker and no other: what its peer had of it fails with a typed error, and every block comes back.

One worker of two shards and one of two stages; KV crosses over shm and over gloo, the other way round. The peer's leader stops itself in
the middle of the transfer (`pausing_rank`), so that it is under way when the rank dies, whoever is faster.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import shared_memory, wait_for
from diptych.cluster.process.child import DIED
from diptych.core.commands import Decode, Failed, NewTokens, Prefill
from diptych.core.errors import TransferFailed, Unavailable
from diptych.core.fleet import Phase
from diptych.core.request import new_attempt_id
from diptych.core.transfer import Transport
from e2e_harness import Rank, Workers, attached, rank_spec, request, wait_idle
from pausing import arm, start, stopped
from spread_harness import prompt

SHARDS: dict[str, Any] = {"tp": 2}
STAGES: dict[str, Any] = {"stages": (3, 1)}
SPREADS = {Transport.SHM: (SHARDS, STAGES), Transport.GLOO: (STAGES, SHARDS)}
"""Of the prefill and of the decode worker."""
pytestmark = pytest.mark.timeout(300)  # whoever is lost is started again, two processes that import torch


@dataclass
class Crew:
    """A prefill and a decode worker that can be stopped at a point."""

    directory: Path
    workers: dict[Phase, Rank]

    def replace(self, phase: Phase) -> None:
        """Another worker in the place of one that has ended; ready when it is needed."""
        lost = self.workers[phase]
        lost.kill()
        self.workers[phase] = start(lost.spec, self.directory)

    def ready(self) -> tuple[Rank, Rank]:
        for rank in self.workers.values():
            rank.bring_followers()
        for rank in self.workers.values():
            rank.wait_for("ready")
        return self.workers[Phase.PREFILL], self.workers[Phase.DECODE]


@pytest.fixture(scope="module", params=[Transport.SHM, pytest.param(Transport.GLOO, marks=pytest.mark.nightly)])
def crew(request: pytest.FixtureRequest, tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    transport: Transport = request.param
    directory = tmp_path_factory.mktemp(f"lost-ranks-{transport}")
    workers = {}
    for phase, spread in zip((Phase.PREFILL, Phase.DECODE), SPREADS[transport], strict=True):
        # A chunk of one block makes a long prompt slow enough to be met half way.
        spec = rank_spec(tiny_gemma3_dir, phase, phase.value, kv_tokens=2048, chunk_tokens=16, transports=(transport,), **spread)
        workers[phase] = start(spec, directory)
    crew = Crew(directory, workers)
    try:
        yield crew
    finally:
        for rank in crew.workers.values():
            rank.kill()


async def lose(worker: Rank, victim: int) -> None:
    """Kill one of its ranks: the others end by themselves, and say why; by their connections, and not by its silence."""
    worker.members[victim].process.send_signal(signal.SIGKILL)
    for number, rank in enumerate(worker.members):
        status = await asyncio.to_thread(rank.ended)
        assert status == (-signal.SIGKILL if number == victim else DIED)
        assert number == victim or re.search(f"[Ll]ost rank {victim} of", rank.log.read_text())
        assert "has said nothing for" not in rank.log.read_text()


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "follower"])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_a_rank_killed_in_a_transfer_ends_its_worker_and_no_other(crew: Crew, phase: Phase, victim: int) -> None:
    prefill, decode = crew.ready()
    lost, left = (prefill, decode) if phase is Phase.PREFILL else (decode, prefill)
    pools = {inode for rank in lost.members for inode in rank.mapped_pools()} if phase is Phase.PREFILL else set()

    async def main() -> None:
        arm(crew.directory, "ready" if left is decode else "announce", 2)
        async with attached(prefill, decode) as workers:
            assert workers.prefill is not None
            assert workers.decode is not None
            attempt_id, asked = new_attempt_id(), request(prompt(900, 1), max_tokens=40)
            workers.decode.send(Decode(attempt_id, asked))
            workers.prefill.send(Prefill(attempt_id, asked, workers.decode_address))
            assert await stopped([left]) is left
            await lose(lost, victim)
            left.process.send_signal(signal.SIGCONT)
            of_the_lost, of_the_left = (workers.prefill, workers.decode) if lost is prefill else (workers.decode, workers.prefill)
            with pytest.raises(Unavailable):
                await of_the_lost.until_terminal(attempt_id)
            ended = (await of_the_left.until_terminal(attempt_id))[-1]
            assert isinstance(ended, Failed)
            assert isinstance(ended.error, TransferFailed)
            await wait_idle(workers.clients[left.spec.worker_id])
            while any(pools & rank.mapped_pools() for rank in left.members):  # noqa: ASYNC110  it watches what has no event
                await asyncio.sleep(0.02)
            await serves(left, workers)

    asyncio.run(main())
    crew.replace(phase)
    assert left.alive


async def serves(rank: Rank, workers: Workers) -> None:
    """It still does what it can do alone."""
    path = workers.local if rank.spec.phase is Phase.DECODE else workers.prefill_only
    answer = await path(request(prompt(40, 2), max_tokens=8 if rank.spec.phase is Phase.DECODE else 1))
    assert answer.error is None
    assert answer.tokens


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "follower"])
def test_a_rank_killed_while_it_decodes_ends_its_worker(crew: Crew, victim: int) -> None:
    prefill, decode = crew.ready()

    async def main() -> None:
        async with attached(None, decode) as workers:
            assert workers.decode is not None
            attempt_id = new_attempt_id()
            workers.decode.send(Decode(attempt_id, request(prompt(20, 3), max_tokens=1000), local_prefill=True))
            assert isinstance(await workers.decode.next(attempt_id), NewTokens)
            await lose(decode, victim)
            with pytest.raises(Unavailable):
                await workers.decode.until_terminal(attempt_id)

    asyncio.run(main())
    crew.replace(Phase.DECODE)
    assert prefill.alive


def test_nothing_is_left_of_workers_that_were_all_killed(crew: Crew) -> None:
    workers = crew.ready()
    processes = [rank for worker in workers for rank in worker.members]
    sockets = [rank.sockets() for rank in processes]
    assert all(sockets), "each rank listens on an abstract socket of its pool"
    before = shared_memory()

    async def main() -> None:
        arm(crew.directory, "ready", 2)
        async with attached(*workers) as router:
            task = asyncio.create_task(router.disaggregated(request(prompt(900, 4), max_tokens=40)))
            await stopped(processes)
            for rank in processes:
                rank.process.kill()
            with pytest.raises(Unavailable):
                await task

    asyncio.run(main())
    for phase in Phase:
        crew.replace(phase)
    assert not [rank for rank in processes if Path(f"/proc/{rank.process.pid}").exists()]
    wait_for("the end of their names in shared memory", lambda: shared_memory() <= before)
    assert not set().union(*sockets) & {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
