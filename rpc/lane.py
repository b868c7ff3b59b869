"""The lane: the one stream between two workers that exchange KV. Both ends hold a `Lane`; what is said on it is `kv_transfer`'s."""

from __future__ import annotations

from ..core.transfer import LaneMessage
from .codec_lane import decode_lane_message, encode_lane_message
from .stream import ByteCall, Stream

DIAL_S = 5.0


class Lane(Stream[LaneMessage, LaneMessage]):
    """`send(message)` never blocks; iterate for the peer's messages; `close()` sends what is queued and ends both ends.

    A lane that ends by itself (iteration ends or raises) has failed everything on it.
    """

    def __init__(self, call: ByteCall, *, peer: str) -> None:
        super().__init__(call, encode_lane_message, decode_lane_message, peer=peer)


async def dial_lane(address: str, *, timeout_s: float = DIAL_S) -> Lane:
    """A lane to the worker at `address` (host:port), answered by that worker; on a connection of its own, closed with the lane.

    Raises `Unavailable` if nobody answers within `timeout_s` seconds.
    """
    raise NotImplementedError
