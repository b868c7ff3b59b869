"""`diptych up`: the composition root. From a config to a running cluster, and to nothing left at its end."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...core.access import Access
from ...core.config import ClusterConfig
from ...core.errors import ConfigError, DiptychError
from ...core.model import ModelCard, read_card
from ...core.security import TlsFiles
from ...core.workload import Window
from ...worker.lending import CoreTable
from ..autoplan.pilot import check as check_autoplan
from ..doctor.examining import before_up, require_links
from ..on_ray.launcher import RayLauncher
from ..process import processes
from ..process.child import seconds_alive
from ..process.identities import internal_files
from ..process.launcher import Launch, Launcher, PlainLauncher, child_environment
from ..process.logs import logging_to
from ..process.spec import Worker
from ..resources import preflight
from ..resources.allotment import allot
from ..resources.devices import Gpu, chosen, torch_cuda, visible_gpus
from ..resources.source_check import check_spread
from ..supervising import exposure, state
from ..supervising.control import Numbers, Tell, listen
from ..supervising.crew import Crew
from ..supervising.models import find_model, prepare_model, source_of
from ..supervising.post import Observer, Post, Publisher
from ..supervising.posts import Programs, launch_router, route_spec, workers
from ..supervising.publish import RouterConnection, drain_worker, recorded
from ..supervising.restarts import RestartBudget
from ..supervising.supervisor import Supervisor
from ..supervising.terminal import Terminal
from ..supervising.timeline import TimeLine
from .autoplanning import keep_planned
from .reach import known

REAPER_S = 60.0
"""It ends when it is told to; on a host with too much to do it may not even have begun."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A cluster that is up. `http`, `grpc`: host:port, and how they are asked."""

    http: str
    grpc: str
    access: Access
    wants_key: bool
    card: ModelCard
    terminal: Terminal


WhenUp = Callable[[Served], Awaitable[bool]]
"""Called once the cluster serves; True ends it."""


@dataclass(slots=True)
class Up:
    """One run of the command. `programs`, `connect`, `drain`, `recorded` and `links` are the seams for tests."""

    config: ClusterConfig
    verbose: bool = False
    when_up: WhenUp | None = None
    programs: Programs = field(default_factory=Programs)
    connect: Callable[..., Publisher] = RouterConnection
    drain: Callable[..., Awaitable[int]] = drain_worker
    budget: Callable[[], RestartBudget] = RestartBudget
    recorded: Callable[..., Awaitable[Window]] = recorded
    links: Callable[[state.ClusterState, ClusterConfig, Collection[str] | None], Awaitable[None]] = require_links
    cluster_id: str = field(default_factory=lambda: secrets.token_hex(8))
    cores: Sequence[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))
    _gpus: Sequence[Gpu] = ()

    def run(self) -> None:
        """Serve until told to end; raises `DiptychError` if that could not be, by then nothing is left."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        terminal = Terminal(TimeLine(seconds_alive), verbose=self.verbose)
        stop, kill = asyncio.Event(), asyncio.Event()
        _on_signals(stop, kill, terminal)
        exposure.check(self.config)
        preflight.check_accelerators(self.config)
        self._gpus = () if self.config.ray.joined else chosen(self.config.device, visible_gpus(), torch_cuda())
        preflight.check_ports(self.config)
        preflight.check_ray(self.config)
        on_gpu = bool(self._gpus) or self.config.device == "cuda"
        preflight.check_transports(self.config, on_gpu=on_gpu)
        preflight.check_kv_dtype(self.config, on_gpu=on_gpu)
        preflight.check_quantization(self.config.model.quantization, on_gpu=on_gpu)
        for said in before_up(self.config):
            terminal.warn(said)
        try:
            model_dir = find_model(self.config)
            if model_dir is None:
                check_spread(self.config, source_of(self.config))
                model_dir = await prepare_model(self.config, terminal, stop)
            if model_dir is None:  # told to end meanwhile
                return
            card = read_card(model_dir)
            preflight.check_quantization(card.quantization, on_gpu=on_gpu)
            first = allot(self.config, card, workers(self.config, card, model_dir, self.cores), self._gpus)
            preflight.check_memory(self.config, card, first)
            check_autoplan(self.config, card)
            for note in [*exposure.warnings(self.config), *preflight.warnings(self.config, card, first, len(self.cores))]:
                terminal.warn(note)
            await self._serve(model_dir, card, first, terminal, stop, kill)
        finally:
            terminal.quiet()

    async def _serve(
        self, model_dir: Path, card: ModelCard, first: Sequence[Worker], terminal: Terminal, stop: asyncio.Event, kill: asyncio.Event
    ) -> None:
        name = self.config.model.name or card.name
        with self._claimed(name) as record, _core_table(self.cores) as core_table:
            plain = PlainLauncher(self.cluster_id, record.state.scratch)
            observer = _Both(terminal, record)
            tls = internal_files(self.config, record.state.scratch)
            record.update(internal_tls=tls)
            logs = record.state.logs
            router = launch_router(route_spec(self.config, model_dir, tls), self.programs, logs)
            crew = Crew(
                self.config, card, model_dir, source_of(self.config), self.cores, self.programs, logs, self.budget, tls,
                gpus=self._gpus, core_table=None if self.config.ray.joined else core_table,
            )  # fmt: skip
            launcher = self._worker_launcher(plain, crew.launches(first), observer, tls)
            posts = [Post(router, plain, None, self.budget()), *crew.posts(first, launcher)]
            shown = {} if tls is None else {"tls": tls}
            supervisor = Supervisor(posts, connect=partial(self.connect, **shown), drain=partial(self.drain, **shown), observer=observer)
            scale = partial(self._scale, crew, supervisor, launcher, record)
            greeting = asyncio.create_task(self._greet(supervisor, record, card, terminal, stop))
            planning = asyncio.create_task(keep_planned(self.config, len(self.cores), supervisor, record, scale, self.recorded, stop))
            ear = await listen(self.cluster_id, scale)
            try:
                held = self.config.model.held_as
                what = f"{name} ({card.precision}{f', KV {held}' if held else ''})"
                terminal.say(f"Serving {what}: {_count(first)}. Cluster {self.config.name!r}, logs in {record.state.logs}")
                await supervisor.run(stop, kill)
            finally:
                ear.close()
                greeting.cancel()
                planning.cancel()
                try:
                    with suppress(asyncio.CancelledError):
                        await greeting
                    with suppress(asyncio.CancelledError):
                        await planning
                finally:
                    await launcher.close()

    def _worker_launcher(self, plain: PlainLauncher, launches: Sequence[Launch], observer: Observer, tls: TlsFiles | None) -> Launcher:
        if not self.config.ray.enabled:
            return plain
        return RayLauncher(
            plain,
            address=preflight.ray_address(self.config),
            cores=len(self.cores),
            wanted=launches,
            placing=self.config.ray.placement,
            wait_s=self.config.ray.wait_s,
            log=launches[0].log.with_name("ray.log"),
            log_level=self.config.log.level,
            log_format=self.config.log.format,
            observer=observer,
            # Files of the config are on every host already; those made for this cluster are on this one.
            internal_tls=tls if self.config.ray.joined and self.config.security.internal_tls is None else None,
        )

    async def _scale(
        self, crew: Crew, supervisor: Supervisor, launcher: Launcher, record: _Record, wanted: Numbers, tell: Tell, *,
        in_place: bool = False,
    ) -> None:  # fmt: skip
        """Have so many workers, and see that KV moves to and from those that are new. Raises `DiptychError` if not."""
        before = {post.name for post in supervisor.workers if post.ready}
        await crew.scale(supervisor, launcher, wanted, tell, in_place=in_place)
        await self.links(record.state, crew.config, {post.name for post in supervisor.workers} - before)

    async def _greet(self, supervisor: Supervisor, record: _Record, card: ModelCard, terminal: Terminal, stop: asyncio.Event) -> None:
        """Once the cluster serves: see that KV moves, say where it is, do what was asked for then, and perhaps end it."""
        await supervisor.all_ready.wait()
        terminal.doing("links", "handing KV over between every two workers")
        try:
            await self.links(record.state, self.config, None)
        except DiptychError:
            stop.set()
            raise
        terminal.timeline.mark("cluster", "KV was handed over between every two workers")
        terminal.is_up()
        record.update(ready=True)
        http, grpc = record.state.http, record.state.grpc
        assert http is not None
        assert grpc is not None
        terminal.timeline.mark("cluster", "serves")
        access = known(record.state, Access(os.environ.get("DIPTYCH_API_KEY")))
        terminal.say(_addresses(f"{access.scheme}://{http}", grpc, self.config, self.config.model.name or card.name))
        if self.when_up is not None and await self.when_up(Served(http, grpc, access, self.config.security.asks, card, terminal)):
            stop.set()

    @contextmanager
    def _claimed(self, model: str) -> Iterator[_Record]:
        """Hold the cluster's name, its directories and its reaper; at the end nothing of the cluster is left on this host.

        The logs in the cluster's own directory stay after a failure, as its message points there; the next `up` replaces them.
        """
        home = state.directory(self.config.name)
        logs = Path(self.config.log.directory).absolute() if self.config.log.directory else home / "logs"
        scratch = Path(tempfile.mkdtemp(prefix="diptych-"))
        started = processes.start_ticks(os.getpid())
        assert started is not None
        public = self.config.security.tls
        record = _Record(
            state.ClusterState(
                name=self.config.name,
                id=self.cluster_id,
                pid=os.getpid(),
                started=started,
                scratch=scratch,
                logs=logs,
                model=model,
                tls=public is not None,
                ca=str(Path(public.ca).absolute()) if public and public.ca else None,
            )
        )
        try:
            state.claim(record.state)
        except ConfigError:
            scratch.rmdir()
            raise
        reaper = _start_reaper(record.state)
        failed = True
        with ExitStack() as log:
            try:
                logs.mkdir(parents=True, exist_ok=True)
                for old in logs.glob("*.log"):
                    old.unlink()
                log.enter_context(logging_to(logs / "supervisor.log", self.config.log.level, self.config.log.format))
                yield record
                failed = False
            finally:
                killed = processes.sweep(self.cluster_id, (scratch,), spare=reaper.pid)
                _log.info("ended; %d processes had to be killed", killed)
                (home / state.FILE).unlink(missing_ok=True)
                if not failed:
                    state.forget(self.config.name)
                reaper.communicate(b"done\n", timeout=REAPER_S)


@dataclass(slots=True)
class _Record:
    """Keeps the state file true; an `Observer`."""

    state: state.ClusterState

    def update(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
        state.write(self.state)

    def started(self, name: str, pid: int | None, rank: int = 0) -> None:
        """A worker's leader is the first of its ranks to start: others of that name are those of its last life."""
        others = [process for process in self.state.processes if process.name != name or (rank and process.rank != rank)]
        self.update(processes=(*others, state.Started(name=name, pid=pid, rank=rank)))

    def progress(self, name: str, what: str) -> None:
        return None

    def ready(self, name: str, event: dict[str, Any]) -> None:
        known: dict[str, Any] = {"address": event.get("address") or event.get("grpc")}
        if "layout" in event:
            known |= {"tp": event["layout"]["tp"], "pp": max(1, len(event["layout"]["stages"]))}
        leader = next(process for process in self.state.processes if (process.name, process.rank) == (name, 0))
        others = (process for process in self.state.processes if process is not leader)
        self.update(processes=(*others, leader.model_copy(update=known)))
        if "http" in event:
            self.update(http=event["http"], grpc=event["grpc"], control=event["control"])

    def lost(self, name: str, reason: str, restart_in: float | None) -> None:
        self.started(name, None)

    def left(self, name: str) -> None:
        self.update(processes=tuple(process for process in self.state.processes if process.name != name))

    def flipped(self, name: str, to: str) -> None:
        known = {"name": to, "address": None}
        self.update(processes=tuple(each.model_copy(update=known) if each.name == name else each for each in self.state.processes))


@dataclass(frozen=True, slots=True)
class _Both:
    """Two observers as one."""

    first: Observer
    second: Observer

    def started(self, name: str, pid: int | None, rank: int = 0) -> None:
        self.first.started(name, pid, rank)
        self.second.started(name, pid, rank)

    def progress(self, name: str, what: str) -> None:
        self.first.progress(name, what)
        self.second.progress(name, what)

    def ready(self, name: str, event: dict[str, Any]) -> None:
        self.first.ready(name, event)
        self.second.ready(name, event)

    def lost(self, name: str, reason: str, restart_in: float | None) -> None:
        self.first.lost(name, reason, restart_in)
        self.second.lost(name, reason, restart_in)

    def left(self, name: str) -> None:
        self.first.left(name)
        self.second.left(name)

    def flipped(self, name: str, to: str) -> None:
        self.first.flipped(name, to)
        self.second.flipped(name, to)


def _start_reaper(of: state.ClusterState) -> subprocess.Popen[bytes]:
    """In a session of its own, so that no Ctrl-C and no closing terminal ends it before its work is done."""
    return subprocess.Popen(
        [sys.executable, "-m", "diptych.cluster.process.reaper", of.id, str(state.directory(of.name) / state.FILE), str(of.scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=child_environment(of.id),
        start_new_session=True,
    )


@contextmanager
def _core_table(cores: Sequence[int]) -> Iterator[Path]:
    """Shared memory in which the ranks of this host lend each other cores; gone with this process, whatever becomes of it."""
    fd = os.memfd_create("diptych-cores")
    try:
        os.ftruncate(fd, CoreTable.size(max(cores) + 1))
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


def _on_signals(stop: asyncio.Event, kill: asyncio.Event, terminal: Terminal) -> None:
    """The first signal asks the cluster to end, the second ends it at once."""

    def heard() -> None:
        if stop.is_set():
            kill.set()
        else:
            stop.set()
            terminal.quiet()
            terminal.say("Ending: what runs may finish. Ctrl-C again to end at once.")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, heard)


def _count(workers: Sequence[Worker]) -> str:
    """How many workers of each phase, and how those are spread that have many ranks."""
    said = []
    for phase in dict.fromkeys(worker.phase for worker in workers):
        leaders = [worker.ranks[0] for worker in workers if worker.phase is phase]
        spread = dict.fromkeys(f"tp {spec.tp} × pp {max(1, len(spec.stages))}" for spec in leaders)
        several = f" ({', '.join(spread)})" if any(len(worker.ranks) > 1 for worker in workers if worker.phase is phase) else ""
        said.append(f"{len(leaders)} {phase} worker{'s' if len(leaders) > 1 else ''}{several}")
    return " and ".join(said)


def _addresses(url: str, grpc: str, config: ClusterConfig, model: str) -> str:
    key = " -H 'Authorization: Bearer KEY'" if config.security.asks else ""
    ca = f" --cacert {config.security.tls.ca}" if config.security.tls and config.security.tls.ca else ""
    asked = "diptych generate --api-key KEY" if key else "diptych generate"
    return (
        f"\n  HTTP  {url}/v1    gRPC  {grpc}    metrics  {url}/metrics\n\n"
        f"  curl -N{ca} {url}/v1/completions -H 'Content-Type: application/json'{key} \\\n"
        f'    -d \'{{"model": "{model}", "prompt": "The capital of France is", "max_tokens": 32, "stream": true}}\'\n'
        f'  {asked} "The capital of France is"\n\n'
        "Ctrl-C ends it."
    )
