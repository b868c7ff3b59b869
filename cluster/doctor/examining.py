"""The checks in their order: of the host and the config, which `up` makes too, and of a cluster that runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from ...core.config import ClusterConfig
from ...core.errors import ConfigError, DiptychError
from ...core.fleet import Fleet, LocalPrefill, Phase, WorkerReport
from ...core.model import ModelCard, read_card
from ...core.transfer import Transport, transports_for
from ...rpc.router import RouterClient
from ..resources import preflight
from ..resources.allotment import allot
from ..resources.devices import chosen, hindrance, torch_cuda, visible_gpus
from ..supervising import exposure, state
from ..supervising.models import find_model
from ..supervising.posts import workers
from . import gpus, host, probing
from .finding import Finding, State, note, ok, wrong
from .host import HostFacts
from .links import Link, judge_link, on_gpus, try_links

UP_REFUSES = ("packages", "kernels", "transports", "shared memory", "NCCL")
"""Checks of the host that `up` makes besides its own."""
UP_WARNS = ("device", "transports", "compiler", "address")


def hands_over(config: ClusterConfig) -> bool:
    """Whether KV is to move at all."""
    return config.prefill.all_workers > 0 and config.router.local_prefill is not LocalPrefill.ALWAYS


def transports(config: ClusterConfig) -> tuple[Transport, ...]:
    """Those that the workers may use, the best first. `ConfigError` if they are not for what the workers compute on."""
    on_gpu = config.device == "cuda" if config.ray.joined else bool(chosen(config.device, visible_gpus(), torch_cuda()))
    return transports_for(config.transfer.transports if "transports" in config.transfer.model_fields_set else (), on_gpu=on_gpu)


def before_up(config: ClusterConfig) -> list[str]:
    """What `up` has to say of this host; `ConfigError` for what it refuses."""
    facts = probing.look(ray=config.ray.enabled, gpus=len(visible_gpus()))
    found = list(_host(config, facts, _here(config, transports(config))))
    for finding in found:
        if finding.state is State.WRONG and finding.check in UP_REFUSES:
            raise ConfigError(f"{_of(finding)}{finding.said} {finding.mend}", field=finding.field)
    return [f"{finding.said} {finding.mend}" for finding in found if finding.state is State.NOTE and finding.check in UP_WARNS]


def _of(finding: Finding) -> str:
    return f"{finding.field}: " if finding.field else ""


def examine(config: ClusterConfig, running: state.ClusterState | None) -> Iterator[Finding]:
    """Every check, one after another; those of ports and memory only where the cluster does not run yet."""
    smi = probing.ask_smi()
    facts = probing.look(ray=config.ray.enabled, gpus=len(visible_gpus()))
    try:
        wanted = transports(config)
    except ConfigError as error:
        yield wrong("transports", error.message, "", error.field)
        wanted = ()
    yield from _host(config, facts, _here(config, wanted))
    yield host.judge_files(facts)
    yield host.judge_disk(facts)
    yield host.judge_clock(facts)
    yield from gpus.judge_gpus(smi.query, smi.failure, usable=facts.gpus)
    if smi.query:
        yield from gpus.judge_driver(smi.head, torch_cuda())
    found: list[ModelCard] = []
    said: list[str] = []
    yield _tried("model", partial(_model, config, found))
    yield _tried("security", partial(_security, config, said))
    yield _tried("Ray", partial(_ray, config, facts))
    if running is not None:
        yield from examine_cluster(running, config, wanted)
        return
    yield _tried("ports", partial(_ports, config))
    if found:
        yield _tried("memory", partial(_memory, config, found[0], sorted(os.sched_getaffinity(0)), said))
    yield from (note("settings", each, "") for each in said)


def _host(config: ClusterConfig, facts: HostFacts, wanted: tuple[Transport, ...]) -> Iterator[Finding]:
    yield host.judge_packages(facts)
    yield from _device(config)
    yield host.judge_kernels(facts) if on_gpus(wanted) else host.judge_compiler(facts)
    yield host.judge_shared_memory(facts, ray=config.ray.enabled and not config.ray.joined)
    if wanted:
        yield from host.judge_transports(wanted, facts, hands_over=hands_over(config))
    yield from gpus.judge_nccl(facts.nccl, wanted=_needs_nccl(config, wanted))
    yield host.judge_address(facts, joined=config.ray.joined)


def _device(config: ClusterConfig) -> Iterator[Finding]:
    """GPUs that `auto` passes over; what cannot be as the config says is refused elsewhere."""
    there = visible_gpus()
    if config.device == "auto" and there and not config.ray.joined and (why := hindrance(there, torch_cuda())) is not None:
        yield note("device", f"Models are computed on this host's CPU: {why}.", "Say device: cpu if that is meant.")


def _here(config: ClusterConfig, wanted: tuple[Transport, ...]) -> tuple[Transport, ...]:
    """Those that this host is to have: on a joined Ray cluster the GPUs are those of its nodes."""
    return () if config.ray.joined and config.device == "cuda" else wanted


def _needs_nccl(config: ClusterConfig, wanted: tuple[Transport, ...]) -> bool:
    """Whether KV is to go over it, or what the ranks of a worker tell each other."""
    groups = (group for phase in Phase for group in config.section(phase).all_groups)
    spread = any(group.workers and group.tp * max(group.pp, len(group.stages)) > 1 for group in groups)
    return on_gpus(wanted) and (spread or (hands_over(config) and Transport.NCCL in wanted))


def _tried(check: str, attempt: Callable[[], Finding]) -> Finding:
    """What `up` would refuse is wrong, in its words."""
    try:
        return attempt()
    except DiptychError as error:
        return wrong(check, error.message, "", error.field)


def _model(config: ClusterConfig, found: list[ModelCard]) -> Finding:
    directory = find_model(config)
    if directory is None:
        return note("model", f"{config.model.source} is not prepared yet.", "`diptych up` does that, or `diptych prepare` beforehand.")
    found.append(read_card(directory))
    missing = [name for name in ("tokenizer.json",) if not (directory / name).exists()]
    if missing:
        return wrong("model", f"{directory} has no {missing[0]}.", "It is damaged: remove it, and have it prepared again.", "model.source")
    return ok("model", f"{found[0].name} ({found[0].precision}) in {directory}")


def _security(config: ClusterConfig, said: list[str]) -> Finding:
    """Adds to `said` what works, and should be known."""
    exposure.check(config)
    said += exposure.warnings(config)
    return ok("security", "who comes is asked who he is" if config.security.asks else "this host's alone, or open as the config says")


def _ray(config: ClusterConfig, facts: HostFacts) -> Finding:
    preflight.check_ray(config)
    if not config.ray.enabled:
        return ok("Ray", "not asked for")
    return ok(
        "Ray",
        f"{facts.packages.get('ray')}, " + (f"a head answers at {config.ray.address}" if config.ray.joined else "a local one is started"),
    )


def _ports(config: ClusterConfig) -> Finding:
    preflight.check_ports(config)
    return ok("ports", f"HTTP {config.router.http_port}, gRPC {config.router.grpc_port} on {config.router.host} are free")


def _memory(config: ClusterConfig, card: ModelCard, cores: list[int], said: list[str]) -> Finding:
    """Adds to `said` what works, but not well."""
    planned = workers(config, card, Path(), cores)
    there = () if config.ray.joined else chosen(config.device, visible_gpus(), torch_cuda())
    preflight.check_kv_dtype(config, on_gpu=bool(there) or config.device == "cuda")
    planned = allot(config, card, planned, there)
    preflight.check_memory(config, card, planned)
    said += preflight.warnings(config, card, planned, len(cores))
    return ok("memory", f"suffices for {len(planned)} workers")


def examine_cluster(running: state.ClusterState, config: ClusterConfig, wanted: tuple[Transport, ...]) -> Iterator[Finding]:
    """What can be asked of a cluster of this host. `wanted`: its transports, the best first."""
    if not running.alive:
        yield wrong("cluster", f"The supervisor of {running.name!r} (pid {running.pid}) is gone.", "`diptych down` cleans up after it.")
        return
    if not running.ready or running.http is None or running.control is None:
        yield note("cluster", f"{running.name!r} is still starting.", f"Its logs are in {running.logs}.")
        return
    try:
        fleet, reports = asyncio.run(_describe(running))
    except DiptychError as error:
        yield wrong("router", f"It does not answer: {error.message}", f"See {running.logs / 'router.log'}.")
        return
    yield judge_fleet(fleet, reports, running)
    if (clocks := probing.clock_of(running.http, tls=running.tls)) is not None:
        yield host.judge_skew("the router", *clocks)
    if hands_over(config):
        links = asyncio.run(try_links(fleet.members, running.internal_tls))
        yield from (judge_link(link, wanted) for link in links)


async def _describe(running: state.ClusterState) -> tuple[Fleet, tuple[WorkerReport, ...]]:
    assert running.control is not None
    async with RouterClient(running.control, running.internal_tls) as client:
        return await client.describe()


def judge_fleet(fleet: Fleet, reports: tuple[WorkerReport, ...], running: state.ClusterState) -> Finding:
    live = {report.worker_id for report in reports}
    started = {process.name for process in running.processes if process.name != "router" and process.rank == 0}
    gone = sorted((started | {member.worker_id for member in fleet.members}) - live)
    if gone:
        return wrong(
            "workers", f"The router does not hear {', '.join(gone)}.", f"Their logs are in {running.logs}; a dead one is started again."
        )
    return ok("workers", f"{len(live)} report to the router, fleet version {fleet.version}")


async def _failing(running: state.ClusterState, joined: Collection[str] | None) -> list[Link]:
    fleet, _ = await _describe(running)
    return [link for link in await try_links(fleet.members, running.internal_tls, joined) if not link.works]


async def require_links(running: state.ClusterState, config: ClusterConfig, joined: Collection[str] | None = None) -> None:
    """Hand KV over between every pair of workers, or those with one that has just `joined`; `ConfigError` for the first pair where it does
    not move as configured. What fails is tried twice: a worker may have been started again meanwhile. Workers that have too much else to
    do, as those have for which others join, are no failure."""
    if not hands_over(config):
        return
    for link in await _failing(running, joined) and await _failing(running, joined):
        finding = judge_link(link, transports(config))
        raise ConfigError(f"{finding.field}: {link.name}: {finding.said} {finding.mend}", field=finding.field)
