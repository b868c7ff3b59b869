"""A simulated cluster under a load: arrivals, the router's placement, workers of both phases. Pure.

What is simulated is production's own code on a clock that jumps: schedulers, block pools, leases, transfer machines and placement
are the classes that serve. Only what they ask of a device takes its time from a profile instead of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...core.errors import ContextExceeded, Unavailable
from ...core.fleet import Phase
from ...router.placement import Demand, Path, Policy, Snapshot, place
from ..load.slo import Slo
from ..load.workload import Arrival
from .agenda import Agenda
from .decode import DecodeWorker
from .figures import Histogram
from .lane import Lane
from .life import Life, request_of
from .policies import Policies
from .prefill import PrefillWorker
from .profile import Hardware, Link, Profile
from .sharing import Host
from .worker import Scene, Worker


class World:
    """`on_end` is called with each request that has ended; nothing is kept of it afterwards. `on_late`: with one whose first token has come
    too late, before that. `link`: by which KV moves, one of the profile's."""

    def __init__(
        self,
        profile: Profile,
        hardware: Iterable[Hardware],
        policies: Policies,
        *,
        link: Link | None = None,
        slo: Slo | None = None,
        on_late: Callable[[Life], None] = lambda life: None,
        on_end: Callable[[Life], None] = lambda life: None,
    ) -> None:
        self.agenda = Agenda()
        self.ttft, self.tpot, self.itl, self.gap, self.e2e = (Histogram() for _ in range(5))
        self.requests = self.met = self.refused = 0
        self.paths: dict[str, int] = {}
        self.across: dict[str, int] = {}
        """Requests whose KV left its pair, by why."""
        self._slo, self._on_late, self._on_end = slo or Slo(), on_late, on_end
        self._overheads, self._policies = profile.overheads, policies
        self._policy = Policy(policies.local_prefill, policies.local_prefill_below)
        self._turn = 0
        scene = self._scene = Scene(
            Host(self.agenda, profile), profile.model, policies, link or next(iter(profile.links.values())), self._overheads.message, self
        )
        self.prefills: dict[str, PrefillWorker] = {}
        self.decodes: dict[str, DecodeWorker] = {}
        for number, each in enumerate(hardware, 1):
            if each.phase is Phase.PREFILL:
                name = f"prefill-{len(self.prefills)}"
                self.prefills[name] = PrefillWorker(scene, each, name, number, self._dial)
            else:
                name = f"decode-{len(self.decodes)}"
                self.decodes[name] = DecodeWorker(scene, each, name, number, self.itl)
        self._workers: tuple[Worker, ...] = (*self.prefills.values(), *self.decodes.values())
        self._seen = {worker.name: worker.candidate() for worker in self._workers}

    def run(self, arrivals: Iterable[Arrival], stop: Callable[[], bool] | None = None) -> None:
        """Serve them all, or until `stop` says so. They are taken one by one, when their time has come."""
        self._next(iter(arrivals))
        self.agenda.run(stop)

    def _next(self, arrivals: Iterator[Arrival]) -> None:
        if (arrival := next(arrivals, None)) is not None:
            self.agenda.at(arrival.at + self._overheads.request, self._arrived, arrival, arrivals)

    def _arrived(self, arrival: Arrival, arrivals: Iterator[Arrival]) -> None:
        self._next(arrivals)
        life = Life(f"r{arrival.number}", arrival, request_of(arrival, self._scene.model.max_context))
        if self._policies.most_running is not None and len(self._scene.lives) >= self._policies.most_running:
            self._refuse(life, f"{self._policies.most_running} requests are under way already (router.limits.running)")
            return
        demand = Demand(arrival.prompt_tokens, arrival.output_tokens)
        try:
            placed = place(self._snapshot(), demand, self._policy)
        except (Unavailable, ContextExceeded) as error:
            self._refuse(life, error.message)
            return
        self.paths[placed.path] = self.paths.get(placed.path, 0) + 1
        if placed.across is not None:
            self.across[placed.across] = self.across.get(placed.across, 0) + 1
        self._scene.lives[life.name] = life
        if placed.decode is not None:
            life.decode = placed.decode.worker_id
            self.decodes[life.decode].expect(life, local=placed.path is Path.LOCAL)
        if placed.prefill is not None:
            life.prefill = placed.prefill.worker_id
            self.prefills[life.prefill].add(life, life.decode)

    def _snapshot(self) -> Snapshot:
        """As the router would take it now; only of those that have changed it is made anew."""
        self._turn += 1
        for name, worker in self._scene.stale.items():
            self._seen[name] = worker.candidate()
        self._scene.stale.clear()
        seen = [*self._seen.values()]
        return Snapshot(seen[: len(self.prefills)], seen[len(self.prefills) :], self._turn)

    def _refuse(self, life: Life, why: str) -> None:
        life.refused = why
        self.refused += 1
        self.requests += 1
        self._on_end(life)

    def _dial(self, source: PrefillWorker, at_source: int, address: str) -> Lane:
        destination = self.decodes[address]
        lane = Lane(source, at_source, destination, destination.machine.lane_opened(self.agenda.now))
        destination.lanes[lane.at_destination] = lane
        return lane

    # -- what the workers tell (`worker.Told`) -------------------------------------------------------------------------

    def first_token(self, name: str, now: float, *, last: bool) -> None:
        life = self._scene.lives[name]
        life.first = now
        if last:
            if life.decode is not None:
                raise AssertionError(f"{name} has one token and was sent to {life.decode}")
            self.ended(name, now)
        elif self._slo.ttft is not None and now - life.arrival.at > self._slo.ttft:
            self._on_late(life)

    def ended(self, name: str, now: float) -> None:
        life = self._scene.lives.pop(name)
        life.last = now
        assert life.ttft is not None, "an answer without a token"
        self.requests += 1
        self.ttft.add(life.ttft)
        self.e2e.add(now - life.arrival.at)
        if life.tpot is not None:
            self.tpot.add(life.tpot)
        if life.gap is not None and life.prefill is not None:
            self.gap.add(life.gap)
        self.met += self.meets(life)
        self._on_end(life)

    def meets(self, life: Life) -> bool:
        """Whether the request was within all limits; one token has no TPOT and exceeds none."""
        if life.refused is not None or life.last is None:
            return False
        return self._slo.within(life.ttft, life.tpot, life.last - life.arrival.at)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `AssertionError` unless every request has ended and nothing is held anywhere."""
        assert not self._scene.lives, f"{len(self._scene.lives)} requests wait for ever"
        for worker in self._workers:
            worker.scheduler.check()
            worker.machine.check()
            assert worker.pool.unused, f"{worker.name} holds blocks"
            assert worker.machine.transfers == 0, f"{worker.name} has transfers"

    def counters(self) -> dict[str, float]:
        """Totals of what the schedulers count, over all workers."""
        totals: dict[str, float] = {}
        for worker in self._workers:
            for name, value in worker.counters().items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def as_json(self) -> dict[str, Any]:
        """The summary of a run."""
        end = self.agenda.now
        figures = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "handover_gap": self.gap, "e2e": self.e2e}
        return {
            "seconds": end,
            "requests": self.requests,
            "refused": self.refused,
            "requests_per_s": (self.requests - self.refused) / end if end else 0.0,
            "attainment": {"slo": str(self._slo), "met": self.met, "share": self.met / self.requests if self.requests else 0.0},
            "goodput": self.met / end if end else 0.0,
            "times": {name: found for name, figure in figures.items() if (found := figure.as_json())},
            "paths": self.paths,
            "across": self.across,
            "counters": self.counters(),
            "workers": {
                worker.name: {"steps": worker.counters()["diptych_worker_steps_total"], **worker.course.as_json(end)}
                for worker in self._workers
            },
        }
