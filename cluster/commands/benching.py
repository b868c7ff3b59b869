"""What `diptych bench` does, with its progress shown and its files written."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...core.errors import ConfigError
from ...core.security import TlsFiles
from ..load.choice import Load
from ..load.goodput import Search, Trial
from ..load.measure import Run, measure
from ..load.plot import plot_run, plot_search
from ..load.probing import Prober
from ..load.report import Report, report, rows
from ..load.server import Server, find_server
from ..load.slo import parse_slo
from ..load.summary import summarise
from ..load.table import goodput_sentence, show_probe, show_report
from ..load.workload import limited
from ..spans.collect import Collection, recording
from ..spans.shares import shares_of
from ..spans.table import show_shares
from ..spans.taken import Process
from ..spans.trace import trace_of

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Profiled:
    """A trace for `file`: of the cluster whose router's control port is `control`, for `seconds` at most."""

    file: Path
    seconds: float
    control: str
    tls: TlsFiles | None

    def recording(self) -> AbstractAsyncContextManager[Collection]:
        return recording(self.control, self.tls, self.seconds)

    def show(self, processes: tuple[Process, ...]) -> None:
        """Tables, and the file."""
        show_shares(_out, [shares_of(process) for process in processes])
        self.file.write_text(json.dumps(trace_of(processes)))
        _out.print(f"Where the time went, span by span: {self.file}; open it in https://ui.perfetto.dev.", markup=False)


@dataclass(frozen=True, slots=True)
class Bench:
    """One call of the command. `server`: what `find_server` takes besides the URL."""

    url: str
    server: dict[str, Any]
    load: Load
    rate: float
    warm_up: int
    json: Path | None
    plot: Path | None
    profiled: Profiled | None = None

    async def once(self, slo_text: str | None, *, requests: int | None, seconds: float | None) -> Report | None:
        """Run the load and show its report; None if nothing was answered."""
        self._check_files()
        slo = parse_slo(slo_text) if slo_text else None
        arrivals = limited(self.load.arrivals(self.rate), requests, seconds)
        with _stopped_by_signal() as stop:
            server = await self._find()
            async with AsyncExitStack() as recorded:
                taken = await recorded.enter_async_context(self.profiled.recording()) if self.profiled else None
                with _bar("requests", requests or len(self.load.times) or None) as show:
                    run = await measure(server, arrivals, stop, lambda run: show(len(run.answers), _course(run)))
        if not run.answers:
            return None
        found = report(run.answers, warm_up=self.warm_up, unfinished=run.unfinished, slo=slo, client=run.client)
        show_report(_out, found)
        if self.profiled and taken:
            self.profiled.show(taken.processes)
        self._keep(server, {"report": found.as_json(), "requests": rows(run.answers, self.warm_up)})
        if self.plot:
            plot_run(self.plot, run.answers, self.warm_up, slo, f"{server.model}, {self.rate:g} requests/s")
        return found

    async def goodput(self, slo_text: str, *, target: float, confidence: float, budget_s: float, most: int) -> Search:
        """Search, showing each probe as it ends, and what was found."""
        self._check_files()
        slo, trial, search = parse_slo(slo_text), Trial.growing(target, confidence, most), Search(target, self.rate)
        with _stopped_by_signal() as stop:
            server = await self._find()
            with _bar("probe", None) as show:
                prober = Prober(
                    server, self.load.arrivals, slo, trial, self.warm_up, lambda probe: show(probe.total, f"at {probe.rate:.3g}/s")
                )
                found = await prober.search(search, stop, budget_s)
        for probe in search.probes:
            show_probe(_out, probe)
        sentence = goodput_sentence(found, target, confidence)
        _out.print(sentence, markup=False)
        probes = [{**asdict(probe), "share": probe.share} for probe in search.probes]
        settings = {"slo": str(slo), "target": target, "confidence": confidence, "looks": trial.looks, "sentence": sentence}
        self._keep(server, {"goodput": {**asdict(found), **settings}, "probes": probes})
        if self.plot:
            plot_search(self.plot, search.probes, target, f"{server.model}: {slo}")
        return search

    async def _find(self) -> Server:
        server = await find_server(self.url, **self.server)
        missing = server.dialect.missing
        left_out = f" It does not take {', '.join(missing)}." if missing else ""
        _out.print(f"{self.url} serves {server.model}.{left_out}", markup=False)
        return server

    def _check_files(self) -> None:
        """Before the load and not behind it."""
        for file in (self.json, self.plot, self.profiled.file if self.profiled else None):
            if file is not None and not file.absolute().parent.is_dir():
                raise ConfigError(f"{file.absolute().parent} is no directory, so {file.name} cannot be written there.")

    def _keep(self, server: Server, results: dict[str, Any]) -> None:
        if self.json is None:
            return
        load = {**asdict(self.load), "lengths": len(self.load.lengths), "times": len(self.load.times), "rate": self.rate}
        head = {"taken": datetime.now(UTC).isoformat(timespec="seconds"), "url": self.url, "model": server.model}
        self.json.write_text(json.dumps({**head, "dialect": asdict(server.dialect), "load": load, **results}, indent=1) + "\n")


def _course(run: Run) -> str:
    """Of the last hundred answers: it is told after each."""
    ttft = summarise([answer.ttft for answer in run.answers[-100:] if answer.ttft is not None])
    middle = f", TTFT p50 {1000 * ttft.p50:.0f} ms" if ttft else ""
    return f"{run.sent - len(run.answers)} under way, {run.errors} errors{middle}"


@contextmanager
def _bar(name: str, total: int | None) -> Iterator[Any]:
    """A function of (done, text) that moves a progress bar on stderr, which is drawn anew four times a second at most."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[course]}"))
    with Progress(*columns, console=_err, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(name, total=total, course="")
        yield lambda done, course: progress.update(task, completed=done, course=course)


@contextmanager
def _stopped_by_signal() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one is as ever."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    heard = (signal.SIGINT, signal.SIGTERM)

    def stopped() -> None:
        stop.set()
        for number in heard:
            loop.remove_signal_handler(number)

    for number in heard:
        loop.add_signal_handler(number, stopped)
    try:
        yield stop
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
