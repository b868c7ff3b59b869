"""From a config and a prepared model to the processes to start. Pure but for paths."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.config import ClusterConfig, DecodeSection, PrefillSection
from ..core.fleet import Phase
from ..core.model import ModelCard
from .cores import Share, share_cores, share_for_newcomer
from .launch import Launch
from .memory import kv_bytes, process_bytes
from .spec import RankSpec, RouteSpec

ROUTER = "router"


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"diptych.cluster.{name}")


@dataclass(frozen=True, slots=True)
class Programs:
    """The commands started for a rank and for the router; tests put small fakes here."""

    rank: tuple[str, ...] = field(default_factory=lambda: _module("rank"))
    route: tuple[str, ...] = field(default_factory=lambda: _module("route"))


def rank_specs(config: ClusterConfig, model_dir: Path, cores: Sequence[int]) -> list[RankSpec]:
    """One spec per worker of the start, prefill first."""
    names = [(phase, number) for phase in Phase for number in range(section_of(config, phase).workers)]
    shares = share_cores(cores, [section_of(config, phase).threads for phase, _ in names])
    return [_rank_spec(config, model_dir, phase, number, share) for (phase, number), share in zip(names, shares, strict=True)]


def newcomer_specs(
    config: ClusterConfig, model_dir: Path, cores: Sequence[int], present: Sequence[RankSpec], names: Iterable[tuple[Phase, int]]
) -> list[RankSpec]:
    """Specs of workers that come to `present`, which keep their cores."""
    specs = list(present)
    for phase, number in names:
        others = [Share(spec.threads, spec.cpus) for spec in specs]
        share = share_for_newcomer(cores, others, section_of(config, phase).threads)
        specs.append(_rank_spec(config, model_dir, phase, number, share))
    return specs[len(present) :]


def section_of(config: ClusterConfig, phase: Phase) -> PrefillSection | DecodeSection:
    return config.prefill if phase is Phase.PREFILL else config.decode


def worker_name(phase: Phase, number: int) -> str:
    return f"{phase.value}-{number}"


def worker_number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _rank_spec(config: ClusterConfig, model_dir: Path, phase: Phase, number: int, share: Share) -> RankSpec:
    """On a joined Ray cluster threads and cores are chosen on the worker's node, and these are put aside."""
    section = section_of(config, phase)
    return RankSpec(
        worker_id=worker_name(phase, number),
        phase=phase,
        model_dir=model_dir,
        threads=share.threads,
        cpus=None if config.ray.joined else share.cpus,
        kv_tokens=section.kv_tokens,
        chunk_tokens=section.chunk_tokens,
        max_running=config.decode.max_running,
        lease_s=config.transfer.lease_s,
        offer_wait_s=config.transfer.offer_wait_s,
        peers=section_of(config, Phase.DECODE if phase is Phase.PREFILL else Phase.PREFILL).workers,
        transports=config.transfer.transports,
        log_level=config.log.level,
    )


def route_spec(config: ClusterConfig, model_dir: Path) -> RouteSpec:
    router, template = config.router, config.model.chat_template
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
        log_level=config.log.level,
    )


def launch_rank(spec: RankSpec, programs: Programs, logs: Path) -> Launch:
    """A rank on this host."""
    argv = (*programs.rank, "--spec", spec.model_dump_json(), "--leash")
    return Launch(name=spec.worker_id, argv=argv, log=logs / f"{spec.worker_id}.log")


def launch_rank_on_a_node(spec: RankSpec, config: ClusterConfig, card: ModelCard, source: str, logs: Path) -> Launch:
    """A rank on some node of a joined Ray cluster, where the model of `source` is prepared if it is not there."""
    model = ("--source", source, "--dtype", card.dtype, "--fingerprint", card.fingerprint)
    return Launch(
        name=spec.worker_id,
        argv=(*_module("on_node"), "--spec", spec.model_dump_json(), *model, "--leash"),
        log=logs / f"{spec.worker_id}.log",
        threads=section_of(config, spec.phase).threads,
        memory=kv_bytes(card, spec) + process_bytes(card),
    )


def launch_router(spec: RouteSpec, programs: Programs, logs: Path) -> Launch:
    return Launch(name=ROUTER, argv=(*programs.route, "--spec", spec.model_dump_json(), "--leash"), log=logs / f"{ROUTER}.log")
