"""From a config and a prepared model to the processes to start. Pure but for paths."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.config import ClusterConfig
from ..core.fleet import Phase
from .cores import share_cores
from .launch import Launch
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
    """One spec per worker, prefill first. On a joined Ray cluster cores are not chosen: we do not know its hosts."""
    prefill, decode = config.prefill, config.decode
    wanted = [prefill.threads] * prefill.workers + [decode.threads] * decode.workers
    shares = share_cores(cores, wanted)
    joined = config.ray.enabled and config.ray.address is not None
    specs = []
    for index, share in enumerate(shares):
        is_prefill = index < prefill.workers
        section = prefill if is_prefill else decode
        specs.append(
            RankSpec(
                worker_id=f"prefill-{index}" if is_prefill else f"decode-{index - prefill.workers}",
                phase=Phase.PREFILL if is_prefill else Phase.DECODE,
                model_dir=model_dir,
                threads=share.threads,
                cpus=None if joined else share.cpus,
                kv_tokens=section.kv_tokens,
                chunk_tokens=section.chunk_tokens,
                max_running=decode.max_running,
                lease_s=config.transfer.lease_s,
                offer_wait_s=config.transfer.offer_wait_s,
                transports=config.transfer.transports,
                log_level=config.log.level,
            )
        )
    return specs


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


def launch_rank(spec: RankSpec, programs: Programs, logs: Path, *, cpus: float) -> Launch:
    return Launch(
        name=spec.worker_id,
        argv=(*programs.rank, "--spec", spec.model_dump_json(), "--leash"),
        log=logs / f"{spec.worker_id}.log",
        cpus=cpus,
    )


def launch_router(spec: RouteSpec, programs: Programs, logs: Path) -> Launch:
    return Launch(name=ROUTER, argv=(*programs.route, "--spec", spec.model_dump_json(), "--leash"), log=logs / f"{ROUTER}.log")
