"""`diptych status` and `down`: clusters on this host, by the state they wrote down."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from ...core.access import Access
from ...core.errors import ConfigError, DiptychError, Unavailable
from ...core.fleet import Fleet, Phase, WorkerReport
from ...rpc.router import RouterClient
from ..process import processes
from ..supervising import state
from . import detached
from .reach import known

DRAIN_S = 40.0
"""How long `down` waits for a supervisor: router and workers may each take their drain time of 10 s, and as long again to end."""
KILL_S = 15.0

METRICS_S = 5.0
MOVED = "diptych_kv_transfer_bytes_total"

_out = Console(highlight=False, soft_wrap=True)


def show(name: str | None, *, as_json: bool, api_key: str | None = None) -> bool:
    """Print all clusters, or the one called `name`; whether any runs. What dead ones left is cleaned up, and said."""
    alive = []
    for found in list(state.all_states()):
        if name in (None, found.name):
            if found.alive:
                alive.append(found)
            else:
                _clean(found, quiet=as_json)
    if as_json:
        print(json.dumps([_as_json(found) for found in alive], indent=1))
    elif not alive and (waiting := list(detached.keepers(name))):
        for keeper in waiting:
            output = detached.directory(keeper.name) / detached.OUTPUT
            _out.print(f"Cluster {keeper.name!r} is starting in the background. What it prints: {output}")
    elif not alive:
        _out.print("No cluster runs here. Start one with `diptych up`." if name is None else f"No cluster named {name!r} runs here.")
    else:
        for found in alive:
            _print(found, api_key)
    return bool(alive)


def _clean(found: state.ClusterState, *, quiet: bool = False) -> None:
    killed = state.clean(found)
    state.forget(found.name)
    if not quiet:
        left = f", and ended {killed} processes it had left" if killed else ""
        _out.print(f"Cluster {found.name!r} had been killed; cleaned up after it{left}.", style="yellow")


def _as_json(found: state.ClusterState) -> dict[str, Any]:
    values: dict[str, Any] = found.model_dump(mode="json")
    return values


def _print(found: state.ClusterState, api_key: str | None) -> None:
    stage = "serves" if found.ready else "is starting"
    _out.print(f"[bold]{found.name}[/] {stage} {found.model}, pid {found.pid}, logs in {found.logs}")
    if found.http:
        _out.print(f"  HTTP {'https' if found.tls else 'http'}://{found.http}/v1   gRPC {found.grpc}")
    fleet, answered = _describe(found)
    reports = {report.worker_id: report for report in answered}
    rows: list[tuple[str, ...]] = [("process", "pid", "address", "state", "tp×pp", "running", "waiting", "KV used", "leases")]
    for process in sorted(found.processes, key=lambda process: (process.name, process.rank)):
        if process.rank:
            rows.append((f"{process.name}.rank{process.rank}", str(process.pid or "-"), *[""] * (len(rows[0]) - 2)))
        else:
            rows.append((process.name, str(process.pid or "-"), process.address or "-", *_columns(reports.get(process.name), process)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:  # not a rich table: that would cut columns where there is no terminal
        _out.print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), markup=False)
    if fleet.members:
        _out.print(f"  fleet {fleet.version}: " + ", ".join(f"{len(fleet.of(phase))} {phase} workers" for phase in Phase))
    if pairs := [f"{member.worker_id} + {member.partner}" for member in fleet.of(Phase.PREFILL) if member.partner]:
        _out.print(f"  pairs: {', '.join(pairs)}")
    for line in found.autoplan:
        _out.print(f"  autoplan {line}", markup=False)
    if found.http and (moved := _moved(found.http, known(found, Access(api_key)))):
        _out.print(f"  KV moved: {moved}")


def _moved(http: str, access: Access) -> str:
    """KV handed over by each transport that has, from the router's metrics; nothing while it does not answer."""
    try:
        request = urllib.request.Request(f"{access.scheme}://{http}/metrics", headers=access.headers)
        context = ssl.create_default_context(cafile=access.ca) if access.encrypted else None
        with urllib.request.urlopen(request, timeout=METRICS_S, context=context) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return "the router tells who has an API key (--api-key)" if error.code == HTTPStatus.UNAUTHORIZED else ""
    except OSError:
        return ""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    moved = [sample for sample in samples if sample.name == MOVED and sample.value]
    return ", ".join(f"{sample.value / 1e6:,.1f} MB over {sample.labels['transport']}" for sample in moved)


def _columns(report: WorkerReport | None, process: state.Started) -> tuple[str, ...]:
    spread = f"{process.tp}×{process.pp}" if process.tp else ""
    if report is None:
        return ("ready" if process.address else "starting" if process.pid else "dead", spread, "", "", "", "")
    used = 1 - report.blocks_free / report.blocks_total if report.blocks_total else 0.0
    return (report.state, spread, str(report.running), str(report.waiting), f"{used:.0%}", str(report.leases))


def _describe(found: state.ClusterState) -> tuple[Fleet, tuple[WorkerReport, ...]]:
    """What the router says of its workers; nothing while it does not answer."""

    async def ask(address: str) -> tuple[Fleet, tuple[WorkerReport, ...]]:
        async with RouterClient(address, found.internal_tls) as client:
            return await client.describe()

    if found.control is not None:
        with suppress(DiptychError):
            return asyncio.run(ask(found.control))
    return Fleet(0), ()


def end(name: str | None) -> None:
    """End the cluster `name`, or all; returns when nothing is left. `ConfigError` if there is none of that name."""
    kept = list(detached.keepers(name))
    for keeper in kept:
        _end_keeper(keeper)
    found = [one for one in state.all_states() if name in (None, one.name)]
    if not found and not kept:
        if name is None:
            _out.print("No cluster runs here.")
            return
        others = ", ".join(other.name for other in state.all_states())
        raise ConfigError(f"No cluster named {name!r} runs here." + (f" Running: {others}." if others else ""), field="name")
    for one in found:
        if one.alive:
            _end(one)
        else:
            _clean(one)


def _end_keeper(keeper: detached.Keeper) -> None:
    """Have it end its cluster, and begin it no more."""
    for number, wait_s in ((signal.SIGTERM, DRAIN_S), (signal.SIGKILL, KILL_S)):
        if not _signal(keeper.pid, keeper.started, number) or _gone(keeper, wait_s):
            break
    if state.read(keeper.name) is None:
        _out.print(f"Cluster {keeper.name!r} has ended; nothing is left of it.")


def _end(found: state.ClusterState) -> None:
    """Ask the supervisor to drain and end; then insist."""
    for number, wait_s in ((signal.SIGTERM, DRAIN_S), (signal.SIGTERM, KILL_S), (signal.SIGKILL, KILL_S)):
        if not _signal(found.pid, found.started, number) or _gone(found, wait_s):
            break
    if found.alive:
        raise Unavailable(f"The supervisor of {found.name!r} (pid {found.pid}) does not end, not even by SIGKILL.")
    if state.read(found.name) == found or state.directory(found.name).exists():
        state.clean(found)
        state.forget(found.name)
    _out.print(f"Cluster {found.name!r} has ended; nothing is left of it.")


def _signal(pid: int, started: int, number: signal.Signals) -> bool:
    """Signal the very process that `started` then; whether it was still there."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not processes.is_running(pid, started):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def _gone(found: state.ClusterState | detached.Keeper, within_s: float) -> bool:
    """Wait for the end of a supervisor or keeper; False if it has not come."""
    end_at = time.monotonic() + within_s
    while found.alive and time.monotonic() < end_at:
        time.sleep(0.05)  # not our child: a pidfd would do, but not for one that became a zombie
    return not found.alive
