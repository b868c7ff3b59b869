"""Workers killed or stopped in every stage of a request, with the real router and real processes (DESIGN §2, "what breaks").

The answer is the undisturbed one, token for token; the attempts are as many as the stage says; the survivors' books are right (each
checks them whenever it is idle, and dies if they are wrong) and all their blocks are free again. Ranks stop themselves at the stage
that is meant (`pausing_rank`), so nothing here depends on who is faster.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster_harness import shared_memory, wait_for
from diptych.core.fleet import Fleet, LocalPrefill, Phase, WorkerReport
from diptych.core.generate import Generate, Timing
from diptych.core.sampling import SamplingParams
from diptych.core.transfer import Transport
from diptych.router.server import Router
from diptych.worker.timeline import read_stamps
from e2e_harness import Rank, rank_spec, ranks
from pausing import arm, start, stopped
from router_harness import idle, member, router, until

LEASE_S = 2.0
SEEDED = SamplingParams(max_tokens=40, temperature=1.0, seed=11, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, seed=1, ignore_eos=True)


@dataclass
class Crew:
    """Two prefill and two decode workers that can be stopped at a point, and a judge that nobody disturbs."""

    directory: Path
    transport: Transport
    members: list[Rank]
    judge: Rank
    answers: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = field(default_factory=dict)
    prompts: Iterator[int] = field(default_factory=lambda: itertools.count(100))
    """Numbers of prompts that no worker has in its prefix cache."""

    def arm(self, point: str, passes: int) -> None:
        """The first to have passed `point` so often stops there."""
        arm(self.directory, point, passes)

    async def stopped(self) -> Rank:
        """Who has stopped itself."""
        return await stopped(self.members)

    def latest(self, phase: Phase) -> Rank:
        """Who of this phase has stamped a stage last."""
        stamps = {max((at for _, _, at in read_stamps(r.log.read_text().splitlines())), default=0.0): r for r in self.of(phase)}
        return stamps[max(stamps)]

    def of(self, phase: Phase) -> list[Rank]:
        return [rank for rank in self.members if rank.spec.phase is phase]

    def replace(self, dead: Rank) -> Rank:
        """Another process in its place; not yet ready."""
        again = start(dead.spec, self.directory)
        self.members[self.members.index(dead)] = again
        return again

    async def expected(self, prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
        """The judge's answer, which reads the prompt itself."""
        if (prompt, sampling) not in self.answers:
            async with router([self.judge], LocalPrefill.ALWAYS) as running:
                self.answers[prompt, sampling] = (await Asked.of(running, prompt, sampling).whole()).tokens
        return self.answers[prompt, sampling]


@pytest.fixture(scope="module")
def crew(request: pytest.FixtureRequest, tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    transport: Transport = request.param
    directory = tmp_path_factory.mktemp(f"kills-{transport}")
    # A chunk of one block makes a long prompt slow enough to be met half way.
    names = [("p0", Phase.PREFILL), ("p1", Phase.PREFILL), ("d0", Phase.DECODE), ("d1", Phase.DECODE)]
    common = {"kv_tokens": 2048, "chunk_tokens": 16, "lease_s": LEASE_S, "transports": (transport,)}
    with ranks(directory, rank_spec(tiny_gemma3_dir, Phase.DECODE, "judge", kv_tokens=2048)) as (judge,):
        crew = Crew(
            directory, transport, [start(rank_spec(tiny_gemma3_dir, phase, name, **common), directory) for name, phase in names], judge
        )
        try:
            yield crew
        finally:
            for rank in crew.members:
                rank.kill()
    assert not [rank for rank in crew.members if Path(f"/proc/{rank.process.pid}").exists()]


@dataclass
class Asked:
    """A request under way: its tokens so far, and when they came."""

    task: asyncio.Task[Timing]
    tokens: list[int]
    times: list[float]

    @classmethod
    def of(cls, running: Router, prompt: tuple[int, ...], sampling: SamplingParams) -> Asked:
        tokens: list[int] = []
        times: list[float] = []

        async def ask() -> Timing:
            finish = None
            async for chunk in running.service.generate(Generate(prompt, sampling=sampling)):
                assert [token.index for token in chunk.tokens] == list(range(len(tokens), len(tokens) + len(chunk.tokens)))
                tokens.extend(token.id for token in chunk.tokens)
                times.extend([time.monotonic()] * len(chunk.tokens))
                finish = chunk.finish
            assert finish is not None
            return finish.timing

        return cls(asyncio.create_task(ask()), tokens, times)

    async def whole(self) -> Asked:
        async with asyncio.timeout(60):
            await self.task
        return self

    @property
    def timing(self) -> Timing:
        return self.task.result()

    def pause_after(self, moment: float) -> float:
        """The longest time without a token from `moment` on, in seconds."""
        later = [moment, *(at for at in self.times if at > moment)]
        return max(after - before for before, after in itertools.pairwise(later))


def seen(running: Router) -> set[str]:
    """Ids of the workers that the router takes for alive."""
    return {report.worker_id for report in running.fleet.describe()[1]}


def report(running: Router, rank: Rank) -> WorkerReport:
    """The latest of this rank."""
    return next(report for report in running.fleet.describe()[1] if report.worker_id == rank.spec.worker_id)


def prompt_of(length: int, number: int) -> tuple[int, ...]:
    order = random.Random(number)
    return (2, *(order.randrange(3, 512) for _ in range(length - 1)))


@dataclass(frozen=True)
class Stage:
    """When a rank stops, and whose end that is. `attempts` of the request; with one the victim was no longer needed."""

    name: str
    point: str
    passes: int
    victim: Phase
    attempts: int = 2


STAGES = [
    Stage("P before the Offer", "offer", 0, Phase.PREFILL),
    Stage("P before the Grant", "grant", 0, Phase.PREFILL),
    Stage("P between two pieces", "announce", 2, Phase.PREFILL),
    Stage("P after the Commit that D has not read", "commit", 0, Phase.PREFILL),
    Stage("P before it reads the Ack", "ack", 0, Phase.PREFILL, attempts=1),
    Stage("P after the hand-over", "step", 5, Phase.PREFILL, attempts=1),
    Stage("D before the Grant", "grant", 0, Phase.DECODE),
    Stage("D after the Grant", "ready", 0, Phase.DECODE),
    Stage("D while it decodes", "step", 5, Phase.DECODE),
]
BY_NAME = {stage.name: stage for stage in STAGES}
OVER_EACH = pytest.mark.parametrize("crew", [Transport.SHM, pytest.param(Transport.GLOO, marks=pytest.mark.nightly)], indirect=True)
OVER_SHM = pytest.mark.parametrize("crew", [Transport.SHM], indirect=True)
"""For what is not the transport's to find out."""


def at(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", [BY_NAME[name] for name in names], ids=names)


@asynccontextmanager
async def met(crew: Crew, running: Router, stage: Stage, wasted: int = 0) -> AsyncIterator[tuple[Rank, Rank, list[Asked]]]:
    """A long request at `stage`, with two short ones beside it: `(who has stopped, the victim, the three)`. All must end well, with up to
    `wasted` attempts more than the stage has."""
    prompts = [(prompt_of(900, next(crew.prompts)), SEEDED), (prompt_of(60, 1), GREEDY), (prompt_of(60, 2), SEEDED)]
    expected = [await crew.expected(*prompt) for prompt in prompts]
    crew.arm(stage.point, stage.passes)
    asked = [Asked.of(running, *prompts[0])]
    async with asyncio.timeout(60):
        stopped = await crew.stopped()
    victim = stopped if stopped.spec.phase is stage.victim else crew.latest(stage.victim)
    asked += [Asked.of(running, *prompt) for prompt in prompts[1:]]
    yield stopped, victim, asked
    answers = [(await one.whole()).tokens for one in asked]
    assert answers == expected
    assert asked[0].timing.attempts - stage.attempts in range(wasted + 1)
    assert asked[0].timing.transport == ("" if stage.point == "ack" else crew.transport), "P's word on it, if it came to say it"
    assert all(one.timing.attempts <= 2 + wasted for one in asked)
    await idle(running)


@OVER_EACH
@at(*BY_NAME)
def test_a_killed_worker_changes_no_answer(crew: Crew, stage: Stage) -> None:
    async def main() -> None:
        async with router(crew.members) as running, met(crew, running, stage) as (stopped, victim, asked):
            if stage.attempts == 1:  # D has what it needs, and the router knows
                await until(running, lambda: len(asked[0].tokens) >= 2)
            if stage.name == "P after the hand-over":
                await until(running, lambda: report(running, victim).leases == report(running, victim).running == 0)
            lost = victim.mapped_pools() if stage.victim is Phase.PREFILL else set()  # nobody maps what is D's
            killed_at = time.monotonic()
            victim.kill()
            await until(running, lambda: victim.spec.worker_id not in seen(running))
            survivors = [rank for rank in crew.members if rank is not victim]
            crew.replace(victim)
            if stopped is not victim:
                stopped.process.send_signal(signal.SIGCONT)
            await asked[0].whole()
            print(f"{stage.name}: a pause of {asked[0].pause_after(killed_at):.3f} s")
            await until(running, lambda: not any(lost & rank.mapped_pools() for rank in survivors))
        assert all(rank.alive for rank in crew.members)

    asyncio.run(main())


async def outlive(crew: Crew, stage: Stage) -> None:
    """The rank that stops at `stage` stays so until the answer is there."""
    async with router(crew.members) as running, met(crew, running, stage) as (stopped, victim, asked):
        assert stopped is victim
        stopped_at = time.monotonic()
        await asked[0].whole()
        print(f"{stage.name}: a pause of {asked[0].pause_after(stopped_at):.3f} s")
        await until(running, lambda: victim.spec.worker_id not in seen(running))
        victim.process.send_signal(signal.SIGCONT)
        await until(running, lambda: victim.spec.worker_id in seen(running))
    assert all(rank.alive for rank in crew.members)


@OVER_EACH
@at("P between two pieces", "D after the Grant")
def test_a_worker_stopped_in_a_transfer_changes_no_answer(crew: Crew, stage: Stage) -> None:
    """As if it were dead, though its kernel still acknowledges what it is sent. When it wakes it gives everything back and serves again."""
    asyncio.run(outlive(crew, stage))


@OVER_SHM
@at("D before the Grant", "D while it decodes")
def test_a_worker_stopped_outside_a_transfer_changes_no_answer(crew: Crew, stage: Stage) -> None:
    asyncio.run(outlive(crew, stage))


@OVER_SHM
@at("P between two pieces", "D while it decodes")
def test_a_request_waits_for_the_only_worker_to_come_back(crew: Crew, stage: Stage) -> None:
    """One P and one D, and nobody may stand in: the client of the long request sees a pause, and one who asks meanwhile waits as well.

    An attempt may be wasted on the dead P: its peer may say that their lane broke before the router's own stream does.
    """
    few = [crew.of(Phase.PREFILL)[0], crew.of(Phase.DECODE)[0]]

    async def main() -> None:
        async with router(few) as running, met(crew, running, stage, wasted=1) as (_, victim, asked):
            killed_at = time.monotonic()
            victim.kill()
            await until(running, lambda: victim.spec.worker_id not in seen(running))
            left = [rank for rank in few if rank is not victim]
            running.fleet.publish(Fleet(2, tuple(member(rank) for rank in left)))
            assert running.service.unavailable()
            late = Asked.of(running, prompt_of(60, 1), GREEDY)
            back = crew.replace(victim)
            await asyncio.to_thread(back.wait_for, "ready")
            assert not any(one.task.done() for one in [*asked, late])
            running.fleet.publish(Fleet(3, tuple(member(rank) for rank in [*left, back])))
            await asked[0].whole()
            print(f"{stage.name}: a pause of {asked[0].pause_after(killed_at):.3f} s")
            assert (await late.whole()).tokens == await crew.expected(prompt_of(60, 1), GREEDY)

    asyncio.run(main())


@OVER_EACH
def test_nothing_is_left_of_workers_that_were_all_killed(crew: Crew) -> None:
    before = shared_memory()
    sockets = set()
    for rank in crew.members:
        rank.wait_for("ready")
        sockets |= rank.sockets()
    assert len(sockets) >= 4, "each rank listens on an abstract socket of its pool"

    async def main() -> None:
        async with router(crew.members) as running:
            crew.arm("announce", 2)
            asked = Asked.of(running, prompt_of(900, next(crew.prompts)), SEEDED)
            await crew.stopped()
            for rank in crew.members:
                rank.process.kill()
            asked.task.cancel()
            await asyncio.gather(asked.task, return_exceptions=True)

    asyncio.run(main())
    for rank in list(crew.members):
        rank.kill()
        crew.replace(rank)
        assert not Path(f"/proc/{rank.process.pid}").exists()
    wait_for("the end of their names in shared memory", lambda: shared_memory() <= before)
    assert not sockets & {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
