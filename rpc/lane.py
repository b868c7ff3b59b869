"""The lane: the one stream between two workers that exchange KV. Both ends hold a `Lane`; what is said on it is `kv_transfer`'s."""

from __future__ import annotations

import asyncio

from ..core.errors import Unavailable
from ..core.security import TlsFiles
from ..core.transfer import LaneMessage
from ..proto.worker_pb2 import DESCRIPTOR
from .channels import ClientCall, open_internal_channel
from .codec_lane import decode_lane_messages, encode_lane_message, join_lane_messages
from .stream import ByteCall, Stream

DIAL_S = 5.0
TOGETHER, TOGETHER_BYTES = 64, 1 << 20
"""How many messages are written at once, and of how many bytes together, before the last."""
METHOD = DESCRIPTOR.services_by_name["Worker"].methods_by_name["Lane"]


class Lane(Stream[LaneMessage, LaneMessage]):
    """`send(message)` never blocks; iterate for the peer's messages; `close()` sends what is queued and ends both ends.

    A lane that ends by itself (iteration ends or raises) has failed everything on it.
    """

    def __init__(self, call: ByteCall, *, peer: str) -> None:
        super().__init__(call, encode_lane_message, decode_lane_messages, peer=peer)

    def _next(self) -> bytes:
        """What is queued crosses in one message of gRPC's, which costs each end more than a message of ours."""
        first, rest = super()._next(), list[bytes]()
        size = len(first)
        while self._outbox and 1 + len(rest) < TOGETHER and size < TOGETHER_BYTES:
            rest.append(super()._next())
            size += len(rest[-1])
        return join_lane_messages(first, rest)


async def dial_lane(address: str, *, tls: TlsFiles | None = None, timeout_s: float = DIAL_S) -> Lane:
    """A lane to the worker at `address` (host:port), accepted by that worker; on a connection of its own, closed with the lane.

    `tls`: what this process shows, and by what it knows the other. Raises `Unavailable` if nobody accepts within `timeout_s` seconds.
    """
    peer = f"worker at {address}"
    call = ClientCall(open_internal_channel(address, tls), METHOD, peer=peer, owns_channel=True)
    try:
        async with asyncio.timeout(timeout_s):
            await call.accepted()
    except TimeoutError:
        call.cancel()
        raise Unavailable(f"{peer} did not accept a lane within {timeout_s:g} s.") from None
    except BaseException:
        call.cancel()
        raise
    return Lane(call, peer=peer)
