"""From a config and a prepared model to the processes to start. Pure but for paths."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.fleet import Phase
from ...core.model import ModelCard
from ...core.security import TlsFiles
from ..process.launcher import Launch
from ..process.spec import RankSpec, RouteSpec, Worker, rank_name
from ..resources.allotment import gpus_of
from ..resources.cores import Share, share_cores, shares_for_newcomer
from ..resources.layouts import Layouts, layouts, pairs_of, section_of
from ..resources.memory import kv_bytes, process_bytes

ROUTER = "router"


def _program(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"diptych.cluster.programs.{name}")


@dataclass(frozen=True, slots=True)
class Programs:
    """The commands started for a rank and for the router; tests put small fakes here."""

    rank: tuple[str, ...] = field(default_factory=lambda: _program("rank"))
    route: tuple[str, ...] = field(default_factory=lambda: _program("route"))


Name = tuple[Phase, int, int]
"""Phase, group and number of a worker to be."""


def workers(config: ClusterConfig, card: ModelCard, model_dir: Path, cores: Sequence[int]) -> list[Worker]:
    """The workers of the start, prefill first. `ConfigError` if the model cannot be spread as the config says."""
    spread = layouts(config, card)
    names = [name for phase in Phase for name in _names(config, phase)]
    shares = iter(share_cores(cores, [threads for name in names for threads in _threads(config, spread, name)]))
    return [_worker(config, spread, model_dir, name, list(islice(shares, _ranks(spread, name)))) for name in names]


def newcomers(
    config: ClusterConfig, card: ModelCard, model_dir: Path, cores: Sequence[int], present: Sequence[Worker], names: Iterable[Name]
) -> list[Worker]:
    """Workers that come to `present`, which keep their cores."""
    spread = layouts(config, card)
    found = list(present)
    for name in names:
        others = [Share(spec.threads, spec.cpus) for worker in found for spec in worker.ranks]
        shares = shares_for_newcomer(cores, others, _threads(config, spread, name))
        found.append(_worker(config, spread, model_dir, name, shares))
    return found[len(present) :]


def in_place_of(old: Worker, config: ClusterConfig, card: ModelCard, model_dir: Path, name: Name) -> Worker:
    """The worker `name` on the threads and cores of `old`. Raises `ConfigError` if it is to have others, or other ranks."""
    spread = layouts(config, card)
    was = (old.phase, old.group, worker_number(old.name))
    if _threads(config, spread, name) != _threads(config, spread, was):
        raise ConfigError(f"{worker_name(name[0], name[2])} is to have other threads, or another number of ranks.")
    return _worker(config, spread, model_dir, name, [Share(spec.threads, spec.cpus) for spec in old.ranks])


def _names(config: ClusterConfig, phase: Phase) -> Iterator[Name]:
    groups = [group for group, spread in enumerate(config.section(phase).all_groups) for _ in range(spread.workers)]
    return ((phase, group, number) for number, group in enumerate(groups))


def _threads(config: ClusterConfig, spread: Layouts, name: Name) -> list[int | None]:
    """What each rank asks for."""
    phase, group, _ = name
    return [config.section(phase).all_groups[group].threads] * _ranks(spread, name)


def _ranks(spread: Layouts, name: Name) -> int:
    phase, group, _ = name
    return spread[phase][group].ranks


def worker_name(phase: Phase, number: int) -> str:
    return f"{phase.value}-{number}"


def worker_number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _worker(config: ClusterConfig, spread: Layouts, model_dir: Path, name: Name, shares: Sequence[Share]) -> Worker:
    """`shares`: of its ranks. On a joined Ray cluster threads and cores are chosen on a rank's node, and these are put aside."""
    phase, group, number = name
    section, layout = config.section(phase), spread[phase][group]
    ranks = tuple(
        RankSpec(
            worker_id=worker_name(phase, number),
            phase=phase,
            model_dir=model_dir,
            rank=rank,
            tp=layout.tp,
            stages=layout.stages,
            threads=share.threads,
            cpus=None if config.ray.joined else share.cpus,
            kv_dtype=config.model.held_as,
            kv_tokens=section.all_groups[group].kv_tokens or section.kv_tokens,
            chunk_tokens=section.chunk_tokens,
            max_running=config.decode.max_running,
            cuda_graphs=config.decode.cuda_graphs,
            lease_s=config.transfer.lease_s,
            offer_wait_s=config.transfer.offer_wait_s,
            pairs=pairs,
            transports=config.transfer.transports,
            log_level=config.log.level,
            log_format=config.log.format,
        )
        for rank, (pairs, share) in enumerate(zip(pairs_of(config, spread, phase, group), shares, strict=True))
    )
    return Worker(ranks, group, section_of(config, phase, group), worker_name(phase.other, number) if config.paired else None)


def route_spec(config: ClusterConfig, model_dir: Path, internal_tls: TlsFiles | None = None) -> RouteSpec:
    router, security, template = config.router, config.security, config.model.chat_template
    return RouteSpec(
        model_dir=model_dir,
        model_name=config.model.name,
        chat_template=Path(template).absolute() if template else None,
        host=router.host,
        http_port=router.http_port,
        grpc_port=router.grpc_port,
        local_prefill=router.local_prefill,
        local_prefill_below=router.local_prefill_below,
        limits=router.limits,
        api_keys=Path(security.api_keys).absolute() if security.api_keys else None,
        jwt=security.jwt and security.jwt.from_here(),
        open_metrics=security.open_metrics or not security.asks,
        tls=TlsFiles(Path(security.tls.cert).absolute(), Path(security.tls.key).absolute()) if security.tls else None,
        internal_tls=internal_tls,
        record=Path(router.record).absolute() if router.record else None,
        record_bytes=router.record_bytes,
        log_level=config.log.level,
        log_format=config.log.format,
    )


def launch_worker(worker: Worker, programs: Programs, logs: Path) -> Launch:
    """A worker on this host."""
    return _as_one(
        Launch(
            name=rank_name(spec),
            argv=(*programs.rank, "--spec", spec.model_dump_json(), "--leash"),
            log=logs / f"{rank_name(spec)}.log",
            phase=spec.phase,
            rank=spec.rank,
        )
        for spec in worker.ranks
    )


def launch_on_nodes(worker: Worker, config: ClusterConfig, card: ModelCard, source: str, logs: Path) -> Launch:
    """A worker on nodes of a joined Ray cluster, where the model of `source` is prepared if it is not there."""
    group = config.section(worker.phase).all_groups[worker.group]
    model = ("--source", source, "--dtype", card.dtype, "--quantization", card.quantization, "--fingerprint", card.fingerprint)
    return _as_one(
        Launch(
            name=rank_name(spec),
            argv=(*_program("on_node"), "--spec", spec.model_dump_json(), *model, "--leash"),
            log=logs / f"{rank_name(spec)}.log",
            phase=spec.phase,
            rank=spec.rank,
            threads=group.threads,
            memory=kv_bytes(card, spec) + process_bytes(card, spec),
            gpus=gpus_of(spec, len(worker.ranks)),
            accelerator=group.accelerator or "",
            stages=max(1, len(spec.stages)),
        )
        for spec in worker.ranks
    )


def _as_one(ranks: Iterable[Launch]) -> Launch:
    leader, *followers = ranks
    return replace(leader, followers=tuple(followers))


def launch_router(spec: RouteSpec, programs: Programs, logs: Path) -> Launch:
    return Launch(name=ROUTER, argv=(*programs.route, "--spec", spec.model_dump_json(), "--leash"), log=logs / f"{ROUTER}.log")
