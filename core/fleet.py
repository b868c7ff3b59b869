"""Who serves: what the supervisor publishes to routers, and what each worker reports of itself."""

from __future__ import annotations

from enum import StrEnum

from .layout import Layout
from .value import value


class Phase(StrEnum):
    """`prefill` reads prompts, `decode` writes answers; a decode worker can also prefill locally."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Phase:
        """The one it hands KV to, or gets it from."""
        return Phase.DECODE if self is Phase.PREFILL else Phase.PREFILL


class LocalPrefill(StrEnum):
    """Whether decode workers read prompts themselves. `always` is the colocated server."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


@value
class Member:
    """One worker as the supervisor knows it. `capacity_tokens`: the longest sequence its pool can hold when empty. `partner`: the worker of
    the other phase with which it is a pair, there or not; None where workers are not paired."""

    worker_id: str
    address: str
    phase: Phase
    incarnation: int
    layout: Layout
    capacity_tokens: int
    partner: str | None = None


@value
class Fleet:
    """All workers that should serve. A router keeps the highest `version` it has seen."""

    version: int
    members: tuple[Member, ...] = ()

    def of(self, phase: Phase) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.phase is phase)


class WorkerState(StrEnum):
    """`ready` takes new work; `draining` finishes what it has; `stopping` ends."""

    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


@value
class Measure:
    """A value of a metric (`core.metrics`) at this worker, or a total if that is a counter. `label`: the value of the label that the
    metric has beside the worker's name and phase."""

    name: str
    value: float
    label: str = ""


GRANTS_WAITING = "diptych_worker_grants_waiting"
"""The measure of Offers that wait for a grant."""


@value
class WorkerReport:
    """One message of a worker's Watch stream, sent on change and at least once a second.

    `waiting`: attempts not yet started; `running`: started (on a decode worker each choice counts); `prompt_tokens_waiting`: prompt
    tokens not yet computed; `blocks_free` and `blocks_total`: of the group that has least free, in blocks; cached but unused blocks
    are free. `leases`: transfers that hold blocks here. `counters`: monotonic totals by metric name (`core.metrics`);
    `measures`: what else there is to record.
    """

    worker_id: str
    incarnation: int
    state: WorkerState
    waiting: int
    running: int
    prompt_tokens_waiting: int
    blocks_free: int
    blocks_total: int
    leases: int
    counters: tuple[tuple[str, float], ...] = ()
    measures: tuple[Measure, ...] = ()

    @property
    def grants_wait(self) -> bool:
        """Whether Offers wait here for memory, or at a prefill worker for a grant."""
        return any(each.name == GRANTS_WAITING and each.value for each in self.measures)
