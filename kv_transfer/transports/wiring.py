"""The transports of a rank: which it may use, and the two-sided ones by name."""

from __future__ import annotations

import logging

import torch

from ...core.errors import ConfigError
from ...core.transfer import Transport, transports_for
from .gloo import GlooWires
from .nccl import NcclWires
from .nccl_binding import Nccl, installed
from .two_sided import Wires

log = logging.getLogger(__name__)


def usable(wanted: tuple[Transport, ...], device: torch.device) -> tuple[Transport, ...]:
    """Which of those `wanted` a worker whose pools are on `device` can use; without nccl4py there is no NCCL, which is logged. Raises
    `ConfigError` (field `transfer.transports`) if its pools cannot use one, or none is left."""
    able = transports_for(wanted, on_gpu=device.type != "cpu")
    if Transport.NCCL not in able or installed():
        return able
    missing = "nccl4py is not installed, so KV cannot move over nccl: pip install 'diptych[gpu]'"
    others = tuple(transport for transport in able if transport is not Transport.NCCL)
    if not others:
        raise ConfigError(f"transfer.transports names nccl alone, and {missing}.", field="transfer.transports")
    log.warning("%s. It can over %s.", missing, ", ".join(others))
    return others


def wires_at(host: str, device: torch.device) -> dict[Transport, Wires]:
    """Of a rank that its peers know by `host` and whose pool is on `device`; nothing is opened before the first pair."""
    return {Transport.GLOO: GlooWires(host), Transport.NCCL: NcclWires(host, Nccl(device))}
