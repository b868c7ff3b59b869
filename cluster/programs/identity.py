"""Who a rank is: its worker's layout, what it says of itself to the other ranks, and where others come to it."""

from __future__ import annotations

import ipaddress

from ...core.errors import ConfigError
from ...core.layout import Layout
from ...core.model import ModelCard
from ...rpc.channels import split_address
from ...worker.meeting import Hello
from ..process.child import log_to_stderr
from ..process.spec import BLOCK_SIZE, RankSpec, rank_name


def worker_layout(spec: RankSpec, card: ModelCard) -> Layout:
    """That of the spec's worker; of a pool that sizes itself with one block, until its size is known. Raises `ConfigError` if the model
    cannot be spread like that, or has no such rank."""
    tokens = spec.kv_tokens or BLOCK_SIZE
    layout = card.layout(block_size=BLOCK_SIZE, kv_tokens=tokens, tp=spec.tp, stages=spec.stages, kv_dtype=spec.kv_dtype)
    if spec.rank >= layout.ranks:
        raise ConfigError(f"{spec.worker_id} has {layout.ranks} ranks, which begin at 0, and no rank {spec.rank}.", field="rank")
    return layout


def named(spec: RankSpec) -> RankSpec:
    """`spec`, by whose name the log's lines are told from now on."""
    log_to_stderr(spec.log_level, rank_name(spec), spec.log_format)
    return spec


def hello(spec: RankSpec, layout: Layout) -> Hello:
    """What this rank says of itself to the others."""
    return Hello(spec.rank, spec.worker_id, layout, spec.max_running)


def reachable_host(spec: RankSpec) -> str:
    """The host by which routers, peers and the other ranks reach this rank. Raises `ConfigError` for an address that stands for all
    interfaces: nobody can come to it, and a transport that binds to it would listen where nobody asked it to."""
    host = spec.advertise or split_address(spec.listen)[0]
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        everywhere = False
    if everywhere:
        raise ConfigError(f"Others cannot come to {host}, which names all interfaces; say which host they shall ask.", field="advertise")
    return host
