"""Where a step's time goes: the spans of a process added up. Pure.

A worker's step lasts from when its engine began to wait for it (while there was something to compute) until it was done, or launched on a
GPU, and its lines add up to it: the last is what no span has. A router has no steps; what it does is counted per message of tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...core.recordings import Doing
from ..load.summary import Summary, summarise
from .taken import WAITS, Node, Process, nested

IN_A_STEP = (
    Doing.WAIT,
    Doing.UNDER_WAY,
    Doing.COPY_BLOCKS,
    Doing.TELL_RANKS,
    Doing.INPUTS,
    Doing.FORWARD,
    Doing.ANNOUNCE,
    Doing.SAMPLE,
    Doing.COLLECT,
)
COMPUTING = (Doing.FORWARD, Doing.UNDER_WAY)
"""The first is on a GPU launching the model, while that computes a step before."""
REST = "the rest"
LEAST_OF_A_STEP = 0.005
"""Threads that took less of a core are not shown one by one."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a part takes of a step (`each`, in seconds), without what lies within it. `count`: its spans. `on_core`: mean seconds of a step
    that its thread ran meanwhile."""

    name: str
    count: int
    each: Summary
    on_core: float


@dataclass(frozen=True, slots=True)
class Steps:
    """`lines` add up to `each`. `outside`: the share of a step in which the model does not compute."""

    each: Summary
    lines: tuple[Line, ...]

    @property
    def outside(self) -> float:
        model = sum(line.each.mean for line in self.lines if line.name in COMPUTING)
        return 1 - model / self.each.mean


@dataclass(frozen=True, slots=True)
class Beside:
    """What one thread does beside the steps: mean seconds of a span without what lies within it, its p99, and what there is of it for each
    step (`per_step`, and `on_core` of that)."""

    thread: str
    name: str
    count: int
    each: Summary
    per_step: float
    on_core: float


@dataclass(frozen=True, slots=True)
class Core:
    """Seconds that a thread ran for each step, and that it could have run and had no core."""

    thread: str
    ran: float
    ready: float


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one process. `per`: what is counted, `count` of which there were. `steps` is None of a process without steps."""

    process: Process
    per: str
    count: int
    steps: Steps | None
    beside: tuple[Beside, ...]
    cores: tuple[Core, ...]


def shares_of(process: Process) -> Shares:
    threads = nested(process.recorded.spans)
    engine = {thread for thread, nodes in threads.items() if any(node.span.doing is Doing.STEP for node in nodes)}
    steps = [each for thread in engine for each in _steps(threads[thread])]
    others = {thread: nodes for thread, nodes in threads.items() if thread not in engine}
    per, count = ("step", len(steps)) if steps else ("message", _count(others, Doing.RECEIVE))
    return Shares(
        process, per, count, _added_up(steps) if steps else None, _beside(process, others, max(1, count)), _cores(process, max(1, count))
    )


@dataclass(slots=True)
class _Step:
    lasted: int
    parts: Counter[str] = field(default_factory=Counter)
    on_core: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def _steps(nodes: Sequence[Node]) -> Iterable[_Step]:
    """Of an engine's thread: each step with the wait right before it, if there was something to compute."""
    before: Node | None = None
    for node in nodes:
        if node.span.doing is Doing.STEP:
            waited = before if before is not None and before.span.doing is not Doing.IDLE else None
            yield _step(node, waited)
        before = node if node.span.doing in WAITS else None


def _step(node: Node, waited: Node | None) -> _Step:
    step = _Step(node.span.ended - (waited or node).span.began)
    for each in (*node.all(), *(waited.all() if waited else ())):
        if each.span.doing in IN_A_STEP:
            step.parts[each.span.doing] += each.alone
            step.on_core[each.span.doing] += each.alone_on_core
            step.counts[each.span.doing] += 1
    step.parts[REST] = step.lasted - step.parts.total()
    step.on_core[REST] = node.alone_on_core
    step.counts[REST] = 1
    return step


def _added_up(steps: Sequence[_Step]) -> Steps:
    lines = []
    for name in (*IN_A_STEP, REST):
        if count := sum(step.counts[name] for step in steps):
            each = summarise([step.parts[name] / 1e9 for step in steps])
            assert each is not None
            lines.append(Line(name, count, each, sum(step.on_core[name] for step in steps) / len(steps) / 1e9))
    whole = summarise([step.lasted / 1e9 for step in steps])
    assert whole is not None
    return Steps(whole, tuple(lines))


def _beside(process: Process, threads: dict[int, list[Node]], count: int) -> tuple[Beside, ...]:
    names = {thread.thread: thread.name for thread in process.recorded.threads}
    found: defaultdict[tuple[int, Doing], list[Node]] = defaultdict(list)
    for thread, nodes in threads.items():
        for outer in nodes:
            for node in outer.all():
                found[thread, node.span.doing].append(node)
    lines = []
    for (thread, doing), nodes in found.items():
        each = summarise([node.alone / 1e9 for node in nodes])
        assert each is not None
        on_core = sum(node.alone_on_core for node in nodes) / count / 1e9
        per_step = sum(node.alone for node in nodes) / count / 1e9
        lines.append(Beside(names.get(thread, str(thread)), doing, len(nodes), each, per_step, on_core))
    return tuple(sorted(lines, key=lambda line: (line.thread, -line.per_step)))


def _cores(process: Process, count: int) -> tuple[Core, ...]:
    """The threads that took most, those of one name together; last what all took that are not shown."""
    by_name: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for thread in process.recorded.threads:
        by_name[thread.name][0] += thread.ran
        by_name[thread.name][1] += thread.ready
    lasted = max(1, process.recorded.ended - process.recorded.began)
    cores = [(name, ran, ready) for name, (ran, ready) in by_name.items()]
    shown = sorted((each for each in cores if each[1] + each[2] >= LEAST_OF_A_STEP * lasted), key=lambda each: -each[1])
    left = [each for each in cores if each not in shown and each[1] + each[2]]
    if left:
        shown.append((f"{len(left)} more", sum(each[1] for each in left), sum(each[2] for each in left)))
    return tuple(Core(name, ran / count / 1e9, ready / count / 1e9) for name, ran, ready in shown)


def _count(threads: dict[int, list[Node]], doing: Doing) -> int:
    return sum(node.span.doing is doing for nodes in threads.values() for outer in nodes for node in outer.all())
