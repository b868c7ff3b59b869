"""The messages two workers exchange on a lane to move KV from a source to a destination.

    source                                   destination
      ── Hello ──────────────────────────────▶
      ◀────────────────────────────── Hello ──      versions, incarnations, layouts, the transport chosen; or Refused by name
      ◀────────── Rendezvous* ───────────────▶      two-sided transports: how the two ends find each other
      ── Offer ──────────────────────────────▶
      ── NearlyDone ─────────────────────────▶      only if no Grant has come by then
      ◀────────────────── Grant or Refused ──       at once, or when memory frees
      ── Ready* ─────────────────────────────▶      pieces, layer by layer as they are computed (two-sided: as they are staged)
      ── Commit ─────────────────────────────▶
      ◀──────────────────────────────── Ack ──      committed and every piece counted
      ◀──────────────── Cancel ──────────────▶      from either side, in any state

A lane that breaks has failed every transfer on it. Durations only; no clock reading crosses the wire.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .errors import ConfigError
from .layout import Layout
from .request import Token
from .value import value

PROTOCOL_VERSION = 10


class Transport(StrEnum):
    """How KV crosses, the best first. `cuda_ipc` and `nccl` are for pools on GPUs, `shm` and `gloo` for pools in host memory.

    `cuda_ipc` and `shm`, within a host, are one-sided: the destination copies from the source's pool. `nccl` and `gloo` (TCP) are
    two-sided: what the source announces it sends, and the destination receives.
    """

    CUDA_IPC = "cuda_ipc"
    NCCL = "nccl"
    SHM = "shm"
    GLOO = "gloo"

    @property
    def on_gpu(self) -> bool:
        """Whether it is for pools on GPUs."""
        return self in (Transport.CUDA_IPC, Transport.NCCL)

    @property
    def two_sided(self) -> bool:
        """Whether what the source announces comes by itself."""
        return self in (Transport.NCCL, Transport.GLOO)


def transports_for(wanted: tuple[Transport, ...], *, on_gpu: bool) -> tuple[Transport, ...]:
    """What a worker may use, the best first; `wanted` empty: all that its pools can. Raises `ConfigError` (field `transfer.transports`) if
    its pools, on GPUs or not, cannot use one that is wanted."""
    able = tuple(transport for transport in Transport if transport.on_gpu is on_gpu)
    for transport in wanted:
        if transport not in able:
            here, there = ("on a GPU", "in host memory") if on_gpu else ("in host memory", "on a GPU")
            message = f"transfer.transports names {transport}, which moves KV that is {there}; here KV is {here}, for {' and '.join(able)}."
            raise ConfigError(message, field="transfer.transports")
    return wanted or able


class RefusedReason(StrEnum):
    UNKNOWN = "unknown"
    """No Decode came for this transfer id in time."""
    CLOSED = "closed"
    """The transfer id was used before, or its Decode was cancelled."""
    NO_MEMORY = "no_memory"
    """The prompt can never fit the destination's pool."""
    LAYOUT = "layout"
    """The two workers' KV cannot be exchanged: layouts or protocol versions differ."""
    TRANSPORT = "transport"
    """There is no transport that both ends may use (for `cuda_ipc` and `shm`: they are not on the same host)."""
    DRAINING = "draining"
    FAILED = "failed"
    """A piece failed, or a lease ran out."""


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """A grant's fence number: pieces of another epoch are never counted."""

    incarnation: int
    counter: int


@value
class ShmEndpoint:
    """How to reach the pool of one rank on the same host: an abstract Unix socket that hands out its memfd to who knows the nonce (16
    bytes), a secret of the lanes, which must be read there too before the host counts as the same. Of a pool on a GPU the memfd says
    where the GPU's memory is."""

    socket: str
    nonce: bytes = field(repr=False)


@value
class Hello:
    """First message each way on a lane.

    `transports`: the source's are those it may use; the destination answers with the one that it has chosen. `shm`: by rank; () if
    this end has no pool to share.
    """

    worker_id: str
    incarnation: int
    layout: Layout
    shm: tuple[ShmEndpoint, ...]
    transports: tuple[Transport, ...]
    protocol_version: int = PROTOCOL_VERSION


@value
class Rendezvous:
    """What one end of a route's pair tells its other end so that the two can connect; only the transport understands it."""

    route: int
    key: str
    value: bytes


@value
class Offer:
    """The source has begun to compute a prompt of `prompt_tokens` tokens and owns blocks for all of it."""

    transfer_id: str
    prompt_tokens: int


@value
class NearlyDone:
    """The source has begun to store the last positions of a prompt it offered: what is granted now will not lie idle for long."""

    transfer_id: str


@value
class GroupGrant:
    """Destination blocks of one cache group, for positions `first_position` (a multiple of the block size) up to the
    prompt's end, in order."""

    first_position: int
    blocks: tuple[int, ...]


@value
class Grant:
    transfer_id: str
    epoch: Epoch
    groups: tuple[GroupGrant, ...]


@value
class Refused:
    """No to one transfer; with an empty `transfer_id`, in answer to Hello, no to the whole lane, which then closes."""

    transfer_id: str
    reason: RefusedReason
    message: str


@value
class Ready:
    """A piece may be taken: tokens [start, stop) of `layers` (model layer numbers, all of `group`). `seq` counts the pieces of a
    transfer from 0. `route` is the way it takes, from one source rank to one destination rank: both ends number them alike.

    One-sided: it lies in the source's `blocks`, of which `blocks[0]` holds position `start`. `slot` and `word`: the source's epoch
    word for this transfer, and the value it must still have after the copy for the piece to count. Two-sided: it comes next in the
    pair's one queue, whatever becomes of its transfer, with its checksum before it; `blocks` is empty.
    """

    transfer_id: str
    epoch: Epoch
    seq: int
    group: int
    layers: tuple[int, ...]
    start: int
    stop: int
    blocks: tuple[int, ...]
    slot: int = 0
    word: int = 0
    route: int = 0


@value
class Commit:
    """All pieces are announced (`pieces` in number), and these are the first tokens, one per choice that is `opening`
    (end tokens too: what ended at once is not to be written)."""

    transfer_id: str
    pieces: int
    first_tokens: tuple[Token, ...]


@value
class Ack:
    """The destination has every piece and the Commit; the source may free. `kv_bytes` were copied in `seconds`, first piece
    to last."""

    transfer_id: str
    kv_bytes: int
    seconds: float


@value
class Cancel:
    transfer_id: str
    reason: str


@value
class KeepAlive:
    """The source still works on these granted transfers; renews their leases."""

    transfer_ids: tuple[str, ...]


LaneMessage = Hello | Rendezvous | Offer | NearlyDone | Grant | Refused | Ready | Commit | Ack | Cancel | KeepAlive
