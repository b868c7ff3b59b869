"""Lane messages ↔ their wire form: exact inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core.errors import InvalidRequest
from ..core.transfer import (
    Ack,
    Cancel,
    Commit,
    Epoch,
    Grant,
    GroupGrant,
    Hello,
    KeepAlive,
    LaneMessage,
    NearlyDone,
    Offer,
    Ready,
    Refused,
    RefusedReason,
    Rendezvous,
    ShmEndpoint,
    Transport,
)
from ..proto import worker_pb2 as pb
from .codec_commands import read_tokens, write_token
from .codec_fields import chosen, duration, parse, present, word
from .codec_fleet import read_layout, write_layout

NONCE_BYTES = 16


def encode_lane_message(message: LaneMessage) -> bytes:
    wire = pb.LaneMessage()
    match message:
        case Ready():
            wire.ready.CopyFrom(_ready(message))
        case Offer(transfer_id, prompt_tokens):
            wire.offer.CopyFrom(pb.Offer(transfer_id=transfer_id, prompt_tokens=prompt_tokens))
        case NearlyDone(transfer_id):
            wire.nearly_done.CopyFrom(pb.NearlyDone(transfer_id=transfer_id))
        case Grant(transfer_id, epoch, groups):
            grants = [pb.GroupGrant(first_position=group.first_position, blocks=group.blocks) for group in groups]
            wire.grant.CopyFrom(pb.Grant(transfer_id=transfer_id, epoch=_epoch(epoch), groups=grants))
        case Commit(transfer_id, pieces, tokens):
            wire.commit.CopyFrom(pb.Commit(transfer_id=transfer_id, pieces=pieces, first_tokens=[write_token(token) for token in tokens]))
        case Ack(transfer_id, kv_bytes, seconds):
            wire.ack.CopyFrom(pb.Ack(transfer_id=transfer_id, kv_bytes=kv_bytes, seconds=seconds))
        case Cancel(transfer_id, reason):
            wire.cancel.CopyFrom(pb.Cancel(transfer_id=transfer_id, reason=reason))
        case KeepAlive(transfer_ids):
            wire.keep_alive.CopyFrom(pb.KeepAlive(transfer_ids=transfer_ids))
        case Refused(transfer_id, refused, text):
            wire.refused.CopyFrom(pb.Refused(transfer_id=transfer_id, reason=refused, message=text))
        case Hello():
            wire.hello.CopyFrom(_hello(message))
        case Rendezvous(route, key, value):
            wire.rendezvous.CopyFrom(pb.Rendezvous(route=route, key=key, value=value))
    return wire.SerializeToString()


def _epoch(epoch: Epoch) -> pb.Epoch:
    return pb.Epoch(incarnation=epoch.incarnation, counter=epoch.counter)


def _ready(message: Ready) -> pb.Ready:
    return pb.Ready(
        transfer_id=message.transfer_id,
        epoch=_epoch(message.epoch),
        seq=message.seq,
        group=message.group,
        layers=message.layers,
        start=message.start,
        stop=message.stop,
        blocks=message.blocks,
        slot=message.slot,
        word=message.word,
        route=message.route,
    )


def _hello(message: Hello) -> pb.Hello:
    return pb.Hello(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        layout=write_layout(message.layout),
        shm=[pb.ShmEndpoint(socket=endpoint.socket, nonce=endpoint.nonce) for endpoint in message.shm],
        protocol_version=message.protocol_version,
        transports=message.transports,
    )


def join_lane_messages(first: bytes, rest: Sequence[bytes]) -> bytes:
    """Several encoded messages as one."""
    return first + pb.LaneMessage(rest=rest).SerializeToString() if rest else first


def decode_lane_messages(data: bytes) -> list[LaneMessage]:
    """The inverse of both, in their order."""
    wire = parse(pb.LaneMessage, data)
    return [_read(wire), *(_read(parse(pb.LaneMessage, each)) for each in wire.rest)]


def _read(wire: pb.LaneMessage) -> LaneMessage:
    name = chosen(wire, "message")
    return _READ[name](getattr(wire, name))


def _read_epoch(wire: pb.Grant | pb.Ready) -> Epoch:
    present(wire, "epoch")
    return Epoch(wire.epoch.incarnation, wire.epoch.counter)


def _read_hello(wire: pb.Hello) -> Hello:
    present(wire, "layout", "hello.layout")
    for endpoint in wire.shm:
        if len(endpoint.nonce) != NONCE_BYTES:
            raise InvalidRequest(f"hello.shm.nonce has {len(endpoint.nonce)} bytes, not {NONCE_BYTES}.", field="hello.shm.nonce")
    shm = tuple(ShmEndpoint(endpoint.socket, endpoint.nonce) for endpoint in wire.shm)
    # Names that this version does not know are a newer peer's; it may still have another in common.
    known = {transport.value: transport for transport in Transport}
    transports = tuple(known[name] for name in wire.transports if name in known)
    return Hello(wire.worker_id, wire.incarnation, read_layout(wire.layout), shm, transports, wire.protocol_version)


def _read_grant(wire: pb.Grant) -> Grant:
    groups = tuple(GroupGrant(group.first_position, tuple(group.blocks)) for group in wire.groups)
    return Grant(wire.transfer_id, _read_epoch(wire), groups)


def _read_ready(wire: pb.Ready) -> Ready:
    if wire.stop <= wire.start:
        raise InvalidRequest(f"ready.stop must be above ready.start ({wire.start}), not {wire.stop}.", field="ready.stop")
    return Ready(
        transfer_id=wire.transfer_id,
        epoch=_read_epoch(wire),
        seq=wire.seq,
        group=wire.group,
        layers=tuple(wire.layers),
        start=wire.start,
        stop=wire.stop,
        blocks=tuple(wire.blocks),
        slot=wire.slot,
        word=wire.word,
        route=wire.route,
    )


_READ: dict[str, Callable[[Any], LaneMessage]] = {
    "hello": _read_hello,
    "rendezvous": lambda wire: Rendezvous(wire.route, wire.key, wire.value),
    "offer": lambda wire: Offer(wire.transfer_id, wire.prompt_tokens),
    "nearly_done": lambda wire: NearlyDone(wire.transfer_id),
    "grant": _read_grant,
    "refused": lambda wire: Refused(wire.transfer_id, word(RefusedReason, wire.reason, "refused.reason"), wire.message),
    "ready": _read_ready,
    "commit": lambda wire: Commit(wire.transfer_id, wire.pieces, read_tokens(wire.first_tokens)),
    "ack": lambda wire: Ack(wire.transfer_id, wire.kv_bytes, duration(wire.seconds, "ack.seconds")),
    "cancel": lambda wire: Cancel(wire.transfer_id, wire.reason),
    "keep_alive": lambda wire: KeepAlive(tuple(wire.transfer_ids)),
}
