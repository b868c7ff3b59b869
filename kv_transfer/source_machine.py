"""The source's half of the hinge as a pure machine: calls and messages in, actions out. Time comes as `now`, in seconds.

    offered ──Grant──▶ granted ──commit()──▶ committed ──Ack──▶ fencing ──fenced()──▶ (gone, its id remembered)
       └───────────────────┴── cancel, Refused, Cancel, lane ──────▲
                               broken, no Ack for one lease

Who waits here, and until when: a lane being dialled, `HANDSHAKE_S`; an Offer, until Grant, Refused, cancel or the lane's end; a
Commit, one lease. A granted transfer waits for nobody but, on a two-sided transport, for a credit: sends free it, or the pair
breaks and its lane with it. It says KeepAlive three times a lease.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.errors import Cancelled, DiptychError, Internal, InvalidRequest, TransferFailed
from ..core.layout import Layout
from ..core.request import Token
from ..core.transfer import Ack, Cancel, Grant, Hello, LaneMessage, NearlyDone, Offer, Refused, Rendezvous
from .actions import (
    Connect,
    Detach,
    Dial,
    Fence,
    HangUp,
    Introduce,
    Send,
    SourceAction,
    TellFailed,
    TellGranted,
    TellHandedOver,
    TellReleased,
)
from .announcing import to_read, to_stage
from .closed_ids import ClosedIds
from .coverage import Coverage
from .faults import answer_fault, grant_fault
from .keep_alive import GrantsKept
from .source_state import Lane, State, Transfer
from .staging import Staging

WORTH_BYTES = 1 << 20
"""What is announced is so much, or the end. A message, from the layer that is computed to the copy, costs both ends half a millisecond of
CPU together, as much as copying 4 MiB does."""
HANDSHAKE_S = 10.0
"""Longest time from dialling to the peer's Hello. Twice what the destination allows itself, so that its reason arrives."""


class SourceMachine:
    """Every `offer` gives exactly one `TellHandedOver` or `TellFailed`, then exactly one `TellReleased`.

    `slots`: how many epoch words there are, and so how many transfers there may be at once.
    """

    def __init__(self, hello: Hello, lease_s: float, slots: int) -> None:
        self._hello = hello
        self._layout: Layout = hello.layout
        self._ranks = tuple(map(hello.layout.on, range(hello.layout.ranks)))
        self._layer_bytes = tuple(
            {layer: group.token_bytes for group in rank.layout.groups for layer in group.layers} for rank in self._ranks
        )
        """Of one token, by rank."""
        self._lease_s = lease_s
        self._transfers: dict[str, Transfer] = {}
        self._closed = ClosedIds()
        self._lanes: dict[int, Lane] = {}
        self._lane_to: dict[str, int] = {}
        self._lanes_made = 0
        self._words = [0] * slots
        self._free_slots = list(range(slots))
        self._dirty: dict[str, int] = {}
        """Which transfers have something to announce, and the bytes that were computed since they last did."""
        self._keep_alive = GrantsKept(lease_s)

    # -- calls of the worker ------------------------------------------------------------------------------------------

    def offer(self, transfer_id: str, address: str, prompt_tokens: int, now: float) -> list[SourceAction]:
        """Raises `InvalidRequest` if a transfer of this id is under way; an id that has ended fails at once."""
        if transfer_id in self._transfers:
            raise InvalidRequest(f"Transfer {transfer_id} is under way already.", field="transfer_id")
        if self._closed.has(transfer_id, now):
            return self._stillborn(transfer_id, f"Transfer id {transfer_id} was used before.")
        if not self._free_slots:
            return self._stillborn(transfer_id, f"{len(self._words)} transfers are under way; that is the most one worker can have.")
        actions: list[SourceAction] = []
        lane = self._lane(address, now, actions)
        starts = (0,) * len(self._layout.groups)
        computed = tuple(Coverage(rank.layout.groups, starts, prompt_tokens) for rank in self._ranks)
        self._transfers[transfer_id] = Transfer(transfer_id, lane.number, prompt_tokens, self._free_slots.pop(), computed)
        lane.transfers.add(transfer_id)
        if lane.opened_by is None:
            actions.append(Send(lane.number, Offer(transfer_id, prompt_tokens)))
        return actions

    def computed(
        self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: tuple[tuple[int, ...], ...], rank: int = 0
    ) -> bool:
        """What `rank` has stored. True if `announce` now has something to say that is worth a message: what is computed and not announced
        is `WORTH_BYTES`, or the last that the rank computes. The rest is announced with what follows, or by the Commit. Raises `Internal`
        if positions come out of order."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is State.FENCING:
            return False
        try:
            transfer.stored(rank, layers, start, stop, tables)
        except ValueError as error:
            raise Internal(f"Transfer {transfer_id}: computed out of order: {error}.") from error
        nearly_done = stop == transfer.prompt_tokens and not transfer.nearly_done
        transfer.nearly_done |= nearly_done
        if transfer.state is State.GRANTED or (nearly_done and self._lanes[transfer.lane].opened_by is None):
            self._dirty[transfer_id] = self._dirty.get(transfer_id, 0) + (stop - start) * sum(
                map(self._layer_bytes[rank].__getitem__, layers)
            )
        unsaid = self._dirty.get(transfer_id, 0)
        return nearly_done or unsaid >= WORTH_BYTES or (unsaid > 0 and transfer.computed[rank].complete)

    def announce(self, now: float) -> list[SourceAction]:
        """Ready for all that was computed since it was last called; of what has no grant, that it is nearly done."""
        dirty, self._dirty = self._dirty, {}
        actions: list[SourceAction] = []
        for transfer in map(self._transfers.__getitem__, dirty):
            if transfer.state is State.OFFERED:
                actions.append(Send(transfer.lane, NearlyDone(transfer.transfer_id)))
            elif transfer.state is State.GRANTED:  # still: announcing one may fail another
                actions += self._announce(transfer, now)
        return actions

    def commit(self, transfer_id: str, first_tokens: tuple[Token, ...], now: float) -> list[SourceAction]:
        """Raises `Internal` if some position was not computed, or on a second commit."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is State.FENCING:
            return []
        if transfer.first_tokens is not None or not all(computed.complete for computed in transfer.computed):
            raise Internal(f"Transfer {transfer_id}: committed twice, or before all its KV was computed.")
        transfer.first_tokens = first_tokens
        return self._advance(transfer, now) if transfer.state is State.GRANTED else []

    def cancel(self, transfer_id: str, reason: str, now: float) -> list[SourceAction]:
        transfer = self._transfers.get(transfer_id)
        return self._fail(transfer, Cancelled(reason), now, tell_peer=reason) if transfer else []

    # -- the transport ------------------------------------------------------------------------------------------------

    def connected(self, lane: int, now: float, route: int = 0) -> list[SourceAction]:
        """The route's pair stands."""
        staging = self._staging(lane, route)
        if staging is None:
            return []
        staging.connected()
        return self._fill(self._lanes[lane], now)

    def sent(self, lane: int, count: int, now: float, route: int = 0) -> list[SourceAction]:
        """So many pieces of the route are sent."""
        staging = self._staging(lane, route)
        if staging is None:
            return []
        staging.sent(count)
        return self._fill(self._lanes[lane], now)

    def pair_broken(self, lane: int, reason: str, now: float) -> list[SourceAction]:
        """The peer is dead or silent, or there was no way to it: the lane goes with the pair, and the next Offer makes both anew."""
        return self._hang_up(lane, reason, now) if lane in self._lanes else []

    def fenced(self, transfer_id: str, now: float, rank: int = 0) -> list[SourceAction]:
        """Nothing can touch the transfer's blocks on `rank` any more."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or not transfer.fenced_by(rank):
            return []
        del self._transfers[transfer_id]
        self._free_slots.append(transfer.slot)
        return [TellReleased(transfer_id)]

    def close(self, reason: str, now: float) -> list[SourceAction]:
        """Cancel every transfer and hang up every lane."""
        actions: list[SourceAction] = []
        for transfer in list(self._transfers.values()):
            actions += self._fail(transfer, Cancelled(reason), now, tell_peer=reason)
        for lane in list(self._lanes):
            actions += self._hang_up(lane, reason, now)
        return actions

    # -- lanes --------------------------------------------------------------------------------------------------------

    def dialled(self, lane: int, now: float) -> list[SourceAction]:
        return [Send(lane, self._hello)] if lane in self._lanes else []

    def lane_broken(self, lane: int, reason: str, now: float) -> list[SourceAction]:
        """The lane has ended, from whichever side; an unknown lane (hung up before) is ignored."""
        known = self._lanes.get(lane)
        return self._end_lane(lane, f"The lane to {known.address} broke: {reason}", now) if known else []

    def received(self, lane: int, message: LaneMessage, now: float) -> list[SourceAction]:
        """A message from the peer; one that comes on a lane that was hung up is ignored."""
        known = self._lanes.get(lane)
        if known is None:
            return []
        known.heard_at = now
        if isinstance(message, Refused) and not message.transfer_id:
            return self._hang_up(lane, message.message, now)
        if known.opened_by is not None:
            return self._welcome(known, message, now)
        match message:
            case Grant():
                return self._granted(known, message, now)
            case Refused():
                return self._ended_by_peer(known, message.transfer_id, TransferFailed(message.message), now)
            case Cancel():
                return self._ended_by_peer(known, message.transfer_id, Cancelled(message.reason), now)
            case Ack():
                return self._acked(known, message, now)
            case Rendezvous(route, key, value) if route < len(known.stagings):
                return [Introduce(lane, route, key, value)]
            case _:
                return self._hang_up(lane, f"It said {type(message).__name__}, which a destination does not say.", now)

    # -- time ---------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` is due; None if nothing waits."""
        times = [lane.opened_by for lane in self._lanes.values()] + [t.acked_by for t in self._transfers.values()] + [self._keep_alive.due]
        return min((time for time in times if time is not None), default=None)

    def expire(self, now: float) -> list[SourceAction]:
        """End the waits that are over, and say KeepAlive where it is due."""
        actions: list[SourceAction] = []
        for lane in list(self._lanes.values()):
            if lane.opened_by is not None and lane.opened_by <= now:
                actions += self._hang_up(lane.number, f"No Hello came within {HANDSHAKE_S:g} s.", now)
        for transfer in list(self._transfers.values()):
            if transfer.acked_by is not None and transfer.acked_by <= now:
                actions += self._unacknowledged(transfer, now)
        return [*actions, *self._keep_alive.say(self._transfers, now)]

    # -- for tests and reports ----------------------------------------------------------------------------------------

    @property
    def transfers(self) -> int:
        """Offered and not yet released."""
        return len(self._transfers)

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        slots = [transfer.slot for transfer in self._transfers.values()] + self._free_slots
        assert sorted(slots) == list(range(len(self._words))), "each slot is free or one transfer's"
        assert self._lane_to == {lane.address: lane.number for lane in self._lanes.values()}, "one lane per address"
        for lane in self._lanes.values():
            lane.check(self._transfers)
        for transfer in self._transfers.values():
            fencing = transfer.state is State.FENCING
            assert fencing != (transfer.lane in self._lanes and transfer.transfer_id in self._lanes[transfer.lane].transfers)
            transfer.check()
        self._keep_alive.check(self._transfers)
        assert all(self._transfers[transfer_id].state in (State.OFFERED, State.GRANTED) for transfer_id in self._dirty)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _stillborn(self, transfer_id: str, message: str) -> list[SourceAction]:
        return [TellFailed(transfer_id, TransferFailed(message)), TellReleased(transfer_id)]

    def _lane(self, address: str, now: float, actions: list[SourceAction]) -> Lane:
        if address in self._lane_to:
            return self._lanes[self._lane_to[address]]
        self._lanes_made += 1
        lane = self._lanes[self._lanes_made] = Lane(self._lanes_made, address, now, now + HANDSHAKE_S)
        self._lane_to[address] = lane.number
        actions.append(Dial(lane.number, address))
        return lane

    def _welcome(self, lane: Lane, message: LaneMessage, now: float) -> list[SourceAction]:
        if not isinstance(message, Hello):
            return self._hang_up(lane.number, f"It said {type(message).__name__} before Hello.", now)
        if (fault := answer_fault(self._hello, message)) is not None:
            return self._hang_up(lane.number, fault, now)
        lane.opened(message, self._layout)
        offers = (self._transfers[transfer_id] for transfer_id in self._transfers if transfer_id in lane.transfers)
        actions: list[SourceAction] = [Send(lane.number, message) for offer in offers for message in offer.opening()]
        return [*actions, Connect(lane.number, message, message.transports[0])] if lane.stagings else actions

    def _staging(self, lane: int, route: int) -> Staging | None:
        stagings = self._lanes[lane].stagings if lane in self._lanes else ()
        return stagings[route] if stagings else None

    def _granted(self, lane: Lane, grant: Grant, now: float) -> list[SourceAction]:
        transfer = self._on(lane, grant.transfer_id)
        if transfer is None:
            return [Send(lane.number, Cancel(grant.transfer_id, "The source has ended this transfer."))]
        if transfer.state is not State.OFFERED:
            return []
        assert lane.layout is not None
        if (wrong := grant_fault(grant.groups, transfer.prompt_tokens, lane.layout)) is not None:
            return self._fail(transfer, TransferFailed(f"The destination's Grant is wrong: {wrong}."), now, tell_peer=wrong)
        transfer.granted(grant, lane, self._layout)
        self._keep_alive.begin(now)
        return [TellGranted(transfer.transfer_id), *self._advance(transfer, now)]

    def _advance(self, transfer: Transfer, now: float) -> list[SourceAction]:
        """Announce what is computed and, if the first tokens are known, commit."""
        return [*self._announce(transfer, now), *self._perhaps_commit(transfer, now)]

    def _perhaps_commit(self, transfer: Transfer, now: float) -> list[SourceAction]:
        """Commit, if the first tokens are known and every piece is announced."""
        if transfer.state is not State.GRANTED or transfer.first_tokens is None or not self._lanes[transfer.lane].announces_all(transfer):
            return []
        self._dirty.pop(transfer.transfer_id, None)
        return [Send(transfer.lane, transfer.commit(acked_by=now + self._lease_s))]

    def _announce(self, transfer: Transfer, now: float) -> list[SourceAction]:
        """Of a two-sided transport's pieces only as many as there are credits are announced."""
        lane = self._lanes[transfer.lane]
        if not transfer.reached:
            return []
        if not lane.stagings:
            return self._said(to_read(self._layout, lane, transfer, self._words[transfer.slot]), now)
        for staging in lane.stagings:
            staging.want(transfer.transfer_id)
        return self._fill(lane, now)

    def _fill(self, lane: Lane, now: float) -> list[SourceAction]:
        """Use the credits there are; what is announced whole is committed."""
        return self._said(to_stage(self._layout, lane, self._transfers, self._words), now)

    def _said(self, found: Iterable[tuple[Transfer, SourceAction | str]], now: float) -> list[SourceAction]:
        """The actions found, and the end of those transfers of which something is lacking."""
        actions: list[SourceAction] = []
        for transfer, said in found:
            if isinstance(said, str):
                actions += self._fail(transfer, TransferFailed(said), now, tell_peer=said)
            else:
                actions += [said, *self._perhaps_commit(transfer, now)]
        return actions

    def _on(self, lane: Lane, transfer_id: str) -> Transfer | None:
        return self._transfers[transfer_id] if transfer_id in lane.transfers else None

    def _acked(self, lane: Lane, ack: Ack, now: float) -> list[SourceAction]:
        transfer = self._on(lane, ack.transfer_id)
        if transfer is None:
            return []
        if transfer.state is not State.COMMITTED:
            return self._fail(transfer, TransferFailed("The destination acknowledged what was not committed."), now, tell_peer="early Ack")
        assert lane.transport is not None
        return [TellHandedOver(transfer.transfer_id, ack.kv_bytes, ack.seconds, lane.transport), self._fence(transfer, now)]

    def _ended_by_peer(self, lane: Lane, transfer_id: str, error: DiptychError, now: float) -> list[SourceAction]:
        transfer = self._on(lane, transfer_id)
        return self._fail(transfer, error, now, tell_peer=None) if transfer else []

    def _unacknowledged(self, transfer: Transfer, now: float) -> list[SourceAction]:
        """A peer that said nothing at all for the lease may be stopped: its lane ends too, so that the next Offer finds out soon."""
        if transfer.state is not State.COMMITTED:
            return []
        lane = self._lanes[transfer.lane]
        message = f"No Ack came within the lease of {self._lease_s:g} s."
        if now - lane.heard_at >= self._lease_s:
            return self._hang_up(lane.number, message, now)
        return self._fail(transfer, TransferFailed(message), now, tell_peer=message)

    def _fence(self, transfer: Transfer, now: float) -> Fence:
        """Terminal: from here on the transfer only waits for its fence. The word is spent, whatever the end was, so that every
        transfer has a word of its own."""
        lane = self._lanes.get(transfer.lane)
        if lane is not None:
            lane.transfers.discard(transfer.transfer_id)
            for staging in lane.stagings:
                staging.drop(transfer.transfer_id)
        self._dirty.pop(transfer.transfer_id, None)
        self._closed.add(transfer.transfer_id, now)
        transfer.state, transfer.fencing = State.FENCING, {rank.rank for rank in self._ranks}
        transfer.acked_by = None
        self._words[transfer.slot] += 1
        return Fence(transfer.transfer_id, transfer.slot, self._words[transfer.slot])

    def _fail(self, transfer: Transfer, error: DiptychError, now: float, *, tell_peer: str | None) -> list[SourceAction]:
        if transfer.state is State.FENCING:
            return []
        actions: list[SourceAction] = []
        lane = self._lanes.get(transfer.lane)
        if tell_peer is not None and lane is not None and lane.opened_by is None:
            actions.append(Send(lane.number, Cancel(transfer.transfer_id, tell_peer)))
        return [*actions, TellFailed(transfer.transfer_id, error), self._fence(transfer, now)]

    def _hang_up(self, lane: int, reason: str, now: float) -> list[SourceAction]:
        return [HangUp(lane, reason), *self._end_lane(lane, f"No lane to {self._lanes[lane].address}: {reason}", now)]

    def _end_lane(self, lane: int, message: str, now: float) -> list[SourceAction]:
        """With a lane end its transfers and its pair."""
        gone = self._lanes.pop(lane)
        del self._lane_to[gone.address]
        mine = [transfer for transfer in self._transfers.values() if transfer.transfer_id in gone.transfers]
        actions = [action for transfer in mine for action in self._fail(transfer, TransferFailed(message), now, tell_peer=None)]
        return [*actions, Detach(lane)] if gone.stagings else actions
