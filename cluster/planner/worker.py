"""What the simulated workers of both phases are: a pool, a production scheduler, a transfer machine, and what is counted of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ...core.fleet import Member, WorkerReport, WorkerState
from ...core.layout import CacheGroup, CacheKind, DType, Layout
from ...core.transfer import Hello, ShmEndpoint, Transport
from ...engine.batch import Batch, Drawn, StepOutput
from ...engine.block_pool import BlockPool
from ...router.placement import Candidate
from ...worker.load import Load
from .agenda import Agenda
from .figures import WorkerCourse
from .latency import StepTimes, Work
from .life import MODEL, TOKEN, Life
from .policies import Policies
from .profile import Hardware, Link, Model
from .sharing import Host

BLOCK = 16
SLOTS = 4096
"""Transfers at once per source, as in a real pool."""
TICK_S = 1.0
"""How often leases are looked at while there are any; they last 10 s."""
_DRAWN = Drawn(TOKEN)


class Told(Protocol):
    """Who is told of tokens."""

    def first_token(self, name: str, now: float, *, last: bool) -> None: ...

    def ended(self, name: str, now: float) -> None: ...


class Scene:
    """What the workers of one simulation share; `lives`: of the requests that have not ended."""

    def __init__(self, host: Host, model: Model, policies: Policies, link: Link, message_s: float, told: Told) -> None:
        self.agenda: Agenda = host.agenda
        self.host, self.model, self.policies, self.link, self.message_s, self.told = host, model, policies, link, message_s, told
        self.lives: dict[str, Life] = {}
        self.stale: dict[str, Worker] = {}
        """By name, those that the router should look at again."""
        self.groups = tuple(
            CacheGroup(CacheKind.WINDOW if window else CacheKind.FULL, (number,), 1, 1, DType.BFLOAT16, window)
            for number, window in enumerate(sorted(model.windows or {0: model.layers}))
        )


class Worker:
    """`number`: unlike any other's. `scheduler` and `machine` are set by the phases; `choices` and `prompt_tokens`: what the router has
    open here."""

    scheduler: Any
    machine: Any
    load: Load

    def __init__(self, scene: Scene, hardware: Hardware, name: str, number: int) -> None:
        self.scene, self.hardware, self.name, self.agenda = scene, hardware, name, scene.agenda
        counts = (hardware.kv_tokens // BLOCK,) * len(scene.groups)
        self.pool = BlockPool(counts, scene.groups, BLOCK)
        self.layout = Layout(MODEL, scene.groups, BLOCK, counts)
        room = min(scene.model.max_context, counts[0] * BLOCK)
        partner = f"{hardware.phase.other.value}-{name.rpartition('-')[2]}" if scene.policies.paired else None
        self.member = Member(name, name, hardware.phase, number, self.layout, room, partner)
        self.course = WorkerCourse()
        self.choices = self.prompt_tokens = 0
        self._ticking = False
        self.place = scene.host.place(hardware, self.repaced) if hardware.on_host else None

    def times(self, rows: int) -> StepTimes:
        """Of a step of so many rows that begins now."""
        return self.hardware.times if self.place is None else self.place.times(rows)

    def repaced(self) -> None:
        """`times` may have changed."""
        raise NotImplementedError

    @property
    def hello(self) -> Hello:
        return Hello(self.name, self.member.incarnation, self.layout, (ShmEndpoint("", b""),), (Transport.SHM,))

    def opened(self, choices: int, prompt_tokens: int) -> None:
        """The router has sent something here (or, below 0, knows that it is over)."""
        self.choices += choices
        self.prompt_tokens += prompt_tokens
        self.scene.stale[self.name] = self

    def changed(self) -> None:
        """What the worker would report is not what it was."""
        load: Load = self.scheduler.load(self.agenda.now)
        self.load = load
        self.scene.stale[self.name] = self
        self.course.put(self.agenda.now, load.waiting, load.running, 1 - load.blocks_free / load.blocks_total)

    def candidate(self) -> Candidate:
        """As the router sees it; reports are sent on every change of who waits or runs."""
        load = self.load
        report = WorkerReport(
            self.name,
            self.member.incarnation,
            WorkerState.READY,
            load.waiting,
            load.running,
            load.prompt_tokens_waiting,
            load.blocks_free,
            load.blocks_total,
            load.leases,
        )
        return Candidate(self.member, report, self.choices, self.prompt_tokens)

    def counters(self) -> dict[str, float]:
        """Totals of what the scheduler counts."""
        return dict(self.scheduler.counters)

    def watch_leases(self) -> None:
        """A transfer has begun: have the machine's deadlines looked at as long as it has any."""
        if not self._ticking and self.machine.transfers:
            self._ticking = True
            self.agenda.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.do(self.machine.expire(self.agenda.now))
        self.watch_leases()

    def do(self, actions: list[Any]) -> None:
        raise NotImplementedError


def output_of(batch: Batch) -> StepOutput:
    """What an engine would answer that always draws the same token."""
    return StepOutput(batch.step, tuple((_DRAWN,) * len(row.draws) for row in batch.rows))


def work_of(batch: Batch, in_chunks: Sequence[bool]) -> Work:
    """What a batch computes; `in_chunks[i]`: row i computes a prompt, or part of one, rather than decodes."""
    tokens = pairs = rows = context = 0
    for row, chunk in zip(batch.rows, in_chunks, strict=True):
        length = row.length
        if chunk:
            tokens += length
            pairs += length * (2 * row.start + length)
        else:
            rows += 1
            context += row.start + length
    return Work(tokens, pairs, rows, context)
