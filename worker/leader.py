"""The leader's way to the other ranks of its worker: steps, transfers' orders and the store of their rendezvous, on one channel to each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from threading import Event
from typing import Any

from ..core.layout import Layout
from ..core.plain_json import from_json
from ..core.transfer import ShmEndpoint
from ..kv_transfer.order_codec import decode, encode
from ..kv_transfer.ranks import DestinationOrder, SourceOrder
from ..kv_transfer.transports.rendezvous import ToldStore
from .channel import Channel, Connection, Died, Kind, pack_entry, unpack_entry
from .loop import RunStep
from .meeting import MEETING_S
from .outbox import Call
from .stepping import StepEngine, Steps

STEP_S = 300.0
"""How long a rank waits for the others in one call of the model plane. Whoever dies or is stopped is found by the channels, in
milliseconds or `channel.SILENCE_S`; this ends only what no rank is to blame for."""


class Leader:
    """Made when all followers are there. `died` ends the process: it is called when one of them is lost."""

    def __init__(self, connections: Mapping[int, Connection], layout: Layout, died: Died) -> None:
        self._layout = layout
        self.store = ToldStore(self._tell_all, MEETING_S)
        """For `engine.parallel.connect`."""
        self._endpoints: dict[int, ShmEndpoint] = {}
        self._all_ready = Event()
        self._steps: Steps | None = None
        self._transfers: Transfers | None = None
        self._channels = {rank: Channel(each, f"rank {rank}", partial(self._heard, rank), died) for rank, each in connections.items()}
        for channel in self._channels.values():
            channel.start()

    def wait_ready(self) -> None:
        """Returns when every follower can compute."""
        self._all_ready.wait()

    def steps(self, engine: StepEngine) -> RunStep:
        """What runs a step at all ranks, `engine` being this one's."""
        self._steps = Steps(engine, self._send_all, ranks=self._layout.ranks, drawing=self._layout.ranks - self._layout.tp)
        return self._steps.run

    def others(self, answer: Callable[[Any], None], call_soon: Callable[[Call], None]) -> list[FollowerRank]:
        """Ranks 1.. of a `Source` or a `Destination`, whose `answer` is called by way of `call_soon`, on the asyncio thread."""
        self._transfers = Transfers(self._channels, self._endpoints, answer, call_soon)
        return self._transfers.ranks

    def change_role(self, order: bytes) -> None:
        """Have the followers compute what they were told, and take the role that `order` names: they are not ready until they have. When no
        step runs and no transfer is left; `steps` and `others` are to be called anew."""
        self._all_ready.clear()
        self._endpoints.clear()
        self._send_all(Kind.ROLE, order)

    def end(self) -> None:
        """Have the followers compute what they were told, and end; returns when they have."""
        for channel in self._channels.values():
            channel.end()
        self._send_all(Kind.END, b"")
        for channel in self._channels.values():
            channel.wait_ended()

    def _send_all(self, kind: Kind, payload: bytes) -> None:
        for channel in self._channels.values():
            channel.send(kind, payload)

    def _tell_all(self, key: str, value: bytes) -> None:
        self._send_all(Kind.STORE, pack_entry(key, value))

    def _heard(self, rank: int, kind: Kind, payload: bytes) -> None:
        match kind:
            case Kind.RAN | Kind.STORED:
                assert self._steps is not None
                self._steps.heard(rank, kind, payload)
            case Kind.ANSWER | Kind.CLOSED:
                assert self._transfers is not None
                self._transfers.heard(rank, kind, payload)
            case Kind.STORE:
                self.store.heard(*unpack_entry(payload))
                for other, channel in self._channels.items():
                    if other != rank:
                        channel.send(kind, payload)
            case Kind.READY:
                self._endpoints[rank] = from_json(ShmEndpoint, payload)
                if len(self._endpoints) == len(self._channels):
                    self._all_ready.set()
            case _:
                raise ValueError(f"rank {rank} has said {kind.name}, which a follower does not say")


class FollowerRank:
    """`kv_transfer.ranks.Rank` of a rank behind a channel."""

    def __init__(self, endpoint: ShmEndpoint, send: Callable[[Kind, bytes], None]) -> None:
        self._endpoint, self._send = endpoint, send
        self.closed = asyncio.Event()

    @property
    def endpoint(self) -> ShmEndpoint:
        return self._endpoint

    def carry_out(self, order: SourceOrder | DestinationOrder) -> None:
        self._send(Kind.ORDER, encode(order))

    async def close(self) -> None:
        self._send(Kind.CLOSE, b"")
        await self.closed.wait()


class Transfers:
    """The followers as ranks of a source or a destination."""

    def __init__(
        self,
        channels: Mapping[int, Channel],
        endpoints: Mapping[int, ShmEndpoint],
        answer: Callable[[Any], None],
        call_soon: Callable[[Call], None],
    ) -> None:
        self._answer, self._call_soon = answer, call_soon
        self.ranks: list[FollowerRank] = [FollowerRank(endpoints[rank], channels[rank].send) for rank in sorted(channels)]

    def heard(self, rank: int, kind: Kind, payload: bytes) -> None:
        """On the channel's thread."""
        self._call_soon(self.ranks[rank - 1].closed.set if kind is Kind.CLOSED else partial(self._answer, decode(payload)))
