"""The destination's half of the hinge as a pure machine: calls and messages in, actions out. Time comes as `now`, in seconds.

    expected ──Offer──▶ offered ──grant()──▶ granted ──Commit, and every piece counted──▶ (committed: gone, its id remembered)
       └───────────────────┴───────────────────┴── cancel, Cancel, lane broken, bad piece, lease ──▶ fencing ──fenced()──▶ (gone)

An Offer may come before `expect`: it is parked. Who waits here, and until when: a new lane for Hello and the attachment,
`HANDSHAKE_S`; a parked Offer, `offer_wait_s`; a grant, one lease after the last piece or KeepAlive; after Commit, only for copies
of our own (one-sided) or for what the source is sending (two-sided), which comes or the pair breaks, and its lane with it. `expected` and
`offered` hold nothing and end with their owners: the router's cancel, the worker's grant or refusal.
"""

from __future__ import annotations

from ..core.errors import Cancelled, DiptychError, Internal, InvalidRequest, TransferFailed
from ..core.layout import Layout
from ..core.transfer import (
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
)
from .actions import (
    DestinationAction,
    Detach,
    Fence,
    HangUp,
    Introduce,
    Send,
    TellFailed,
    TellNearlyDone,
    TellReleased,
)
from .closed_ids import ClosedIds
from .destination_state import Lane, State, Transfer
from .faults import common_transports, grant_fault, place_fault, refusal, size_fault
from .parking import Parking
from .receipt import Receipt
from .staging import slot_bytes

HANDSHAKE_S = 5.0
"""Longest time from a lane's opening to our own Hello."""


class DestinationMachine:
    """Every `expect` gives, unless the worker's `grant` never comes, exactly one `TellCommitted` or `TellFailed`; the latter is
    followed by exactly one `TellReleased`. `slots`: how many epoch words a source has."""

    def __init__(self, hello: Hello, lease_s: float, offer_wait_s: float, slots: int) -> None:
        self._hello = hello
        self._layout: Layout = hello.layout
        self._lease_s = lease_s
        self._offer_wait_s = offer_wait_s
        self._slots = slots
        self._transfers: dict[str, Transfer] = {}
        self._parking = Parking(offer_wait_s)
        self._closed = ClosedIds()
        self._lanes: dict[int, Lane] = {}
        self._lanes_made = 0
        self._grants_made = 0

    # -- calls of the worker ------------------------------------------------------------------------------------------

    def expect(self, transfer_id: str, now: float) -> list[DestinationAction]:
        """Raises `InvalidRequest` if a transfer of this id is under way; an id that has ended fails at once."""
        if transfer_id in self._transfers:
            raise InvalidRequest(f"Transfer {transfer_id} is under way already.", field="transfer_id")
        if self._closed.has(transfer_id, now):
            error = TransferFailed(f"Transfer id {transfer_id} has ended: it was used before, or its Offer was given up.")
            return [TellFailed(transfer_id, error), TellReleased(transfer_id)]
        transfer = self._transfers[transfer_id] = Transfer(transfer_id)
        parked = self._parking.take(transfer_id)
        return transfer.offered(parked.lane, parked.prompt_tokens, nearly_done=parked.nearly_done) if parked else []

    def grant(self, transfer_id: str, groups: tuple[GroupGrant, ...], now: float) -> list[DestinationAction]:
        """Raises `Internal` if `groups` cannot hold the prompt, or on a second grant. Ignored if the transfer has ended."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is State.FENCING:
            return []
        if transfer.state is not State.OFFERED:
            raise Internal(f"Transfer {transfer_id} is {transfer.state}, so it cannot be granted.")
        if (fault := grant_fault(groups, transfer.prompt_tokens, self._layout)) is not None:
            raise Internal(f"Transfer {transfer_id}: the grant is wrong: {fault}.")
        self._grants_made += 1
        grant = Grant(transfer_id, Epoch(self._hello.incarnation, self._grants_made), groups)
        transfer.granted(grant, self._lanes[transfer.lane], self._layout, lease_until=now + self._lease_s)
        return [Send(transfer.lane, grant)]

    def refuse(self, transfer_id: str, reason: RefusedReason, message: str, now: float) -> list[DestinationAction]:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not State.OFFERED:
            return []
        return self._fail(transfer, TransferFailed(message), now, say=Refused(transfer_id, reason, message))

    def cancel(self, transfer_id: str, reason: str, now: float) -> list[DestinationAction]:
        transfer = self._transfers.get(transfer_id)
        return self._fail(transfer, Cancelled(reason), now, say=Cancel(transfer_id, reason)) if transfer else []

    # -- the transport ------------------------------------------------------------------------------------------------

    def attached(self, lane: int, now: float, rank: int = 0) -> list[DestinationAction]:
        """`rank` can copy from the lane's source; when all ranks can, the lane is open."""
        known = self._lanes.get(lane)
        return known.attached(rank, self._hello) if known is not None else []

    def not_attached(self, lane: int, message: str, now: float, rank: int = 0) -> list[DestinationAction]:
        """`rank` cannot reach the source's memory: the next transport is tried, if there is one."""
        known = self._lanes.get(lane)
        if known is None or rank not in known.attaching:
            return []
        if not known.next_transport():
            return self._refuse_lane(lane, Refused("", RefusedReason.TRANSPORT, message), now)
        return known.try_transport(self._hello, message)

    def pair_broken(self, lane: int, reason: str, now: float) -> list[DestinationAction]:
        """The source is dead or silent, or there was no way to it: the lane goes with the pair, and the source makes both anew."""
        return self._refuse_lane(lane, Refused("", RefusedReason.TRANSPORT, reason), now) if lane in self._lanes else []

    def copied(self, transfer_id: str, seq: int, error: str | None, now: float) -> list[DestinationAction]:
        """A copy has ended; without `error` the epoch word stood after it, so the piece counts."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.receipt is None or not transfer.receipt.copying(seq):
            return []
        if error is not None:
            return self._reject(transfer, error, now)
        transfer.receipt.count(seq)
        return self._perhaps_commit(transfer, transfer.receipt, now)

    def fenced(self, transfer_id: str, now: float, rank: int = 0) -> list[DestinationAction]:
        """Nothing can touch the transfer's blocks on `rank` any more."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or not transfer.fenced_by(rank):
            return []
        del self._transfers[transfer_id]
        return [TellReleased(transfer_id)]

    def close(self, reason: str, now: float) -> list[DestinationAction]:
        """Cancel every transfer and hang up every lane."""
        actions: list[DestinationAction] = []
        for transfer in list(self._transfers.values()):
            actions += self._fail(transfer, Cancelled(reason), now, say=Cancel(transfer.transfer_id, reason))
        for lane in list(self._lanes):
            actions += self._hang_up(lane, reason, now)
        return actions

    # -- lanes --------------------------------------------------------------------------------------------------------

    def lane_opened(self, now: float) -> int:
        """The number of a lane a source has dialled; it is never used again."""
        self._lanes_made += 1
        self._lanes[self._lanes_made] = Lane(self._lanes_made, now, opened_by=now + HANDSHAKE_S)
        return self._lanes_made

    def lane_broken(self, lane: int, reason: str, now: float) -> list[DestinationAction]:
        """The lane has ended, from whichever side; an unknown lane (hung up before) is ignored."""
        return self._end_lane(lane, f"The lane broke: {reason}", now) if lane in self._lanes else []

    def received(self, lane: int, message: LaneMessage, now: float) -> list[DestinationAction]:
        """A message from the peer; one that comes on a lane that was hung up is ignored."""
        known = self._lanes.get(lane)
        if known is None:
            return []
        known.heard_at = now
        if known.hello is None:
            return self._introduced(known, message, now)
        if known.opened_by is not None:
            return self._hang_up(lane, f"It said {type(message).__name__} before it was answered.", now)
        match message:
            case Offer():
                return self._offer(known, message, now)
            case NearlyDone(transfer_id):
                return self._nearly_done(known, transfer_id)
            case Ready():
                return self._ready(known, message, now)
            case Commit():
                return self._commit(known, message, now)
            case Cancel():
                return self._cancelled_by_peer(known, message, now)
            case KeepAlive():
                return self._renew(known, message, now)
            case Rendezvous(route, key, value) if known.two_sided and route < len(known.routes):
                return [Introduce(lane, route, key, value)]
            case _:
                return self._hang_up(lane, f"It said {type(message).__name__}, which a source does not say.", now)

    # -- time ---------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` is due; None if nothing waits."""
        times = [lane.opened_by for lane in self._lanes.values()] + [t.lease_until for t in self._transfers.values()]
        return min((time for time in [*times, self._parking.next_deadline] if time is not None), default=None)

    def expire(self, now: float) -> list[DestinationAction]:
        """End the waits that are over."""
        actions: list[DestinationAction] = []
        for lane in list(self._lanes.values()):
            if lane.opened_by is not None and lane.opened_by <= now:
                refused = Refused("", RefusedReason.TRANSPORT, f"The handshake took longer than {HANDSHAKE_S:g} s.")
                actions += self._refuse_lane(lane.number, refused, now)
        for transfer_id, parked in self._parking.take_expired(now):
            actions += self._turn_away(parked.lane, transfer_id, f"No Decode came within {self._offer_wait_s:g} s.", now)
        for transfer in list(self._transfers.values()):
            if transfer.lease_until is not None and transfer.lease_until <= now:
                actions += self._lease_over(transfer, now)
        return actions

    # -- for tests and reports ----------------------------------------------------------------------------------------

    @property
    def transfers(self) -> int:
        """Expected and neither committed nor released."""
        return len(self._transfers)

    @property
    def leases(self) -> int:
        """Transfers whose granted blocks are not yet the worker's again."""
        return sum(1 for transfer in self._transfers.values() if transfer.state in (State.GRANTED, State.FENCING))

    @property
    def parked(self) -> int:
        return len(self._parking)

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        for transfer in self._transfers.values():
            transfer.check(set(self._lanes))
        self._parking.check(set(self._lanes), set(self._transfers))
        names = [lane.hello.worker_id for lane in self._lanes.values() if lane.hello]
        assert len(set(names)) == len(names), "one lane per source"

    # -- inside: lanes ------------------------------------------------------------------------------------------------

    def _introduced(self, lane: Lane, message: LaneMessage, now: float) -> list[DestinationAction]:
        if not isinstance(message, Hello):
            return self._hang_up(lane.number, f"It said {type(message).__name__} before Hello.", now)
        if (refused := refusal(self._hello, message)) is not None:
            return self._refuse_lane(lane.number, refused, now)
        # A source keeps one lane here. If it dials again, it has restarted or its old lane is dead without our knowing.
        others = [other.number for other in self._lanes.values() if other.hello and other.hello.worker_id == message.worker_id]
        ended = [action for other in others for action in self._hang_up(other, f"{message.worker_id} has opened a new lane.", now)]
        lane.introduced(message, self._layout)
        lane.choices = common_transports(self._hello, message)
        return [*ended, *lane.try_transport(self._hello, "")]

    def _refuse_lane(self, lane: int, refused: Refused, now: float) -> list[DestinationAction]:
        return [Send(lane, refused), *self._hang_up(lane, refused.message, now)]

    def _hang_up(self, lane: int, reason: str, now: float) -> list[DestinationAction]:
        return [HangUp(lane, reason), *self._end_lane(lane, f"The lane was closed: {reason}", now)]

    def _end_lane(self, lane: int, message: str, now: float) -> list[DestinationAction]:
        gone = self._lanes.pop(lane)
        actions: list[DestinationAction] = []
        for transfer_id in self._parking.take_lane(lane):
            self._closed.add(transfer_id, now)
        for transfer in [transfer for transfer in self._transfers.values() if transfer.lane == lane]:
            actions += self._fail(transfer, TransferFailed(message), now, say=None)
        return [*actions, Detach(lane)] if gone.hello is not None else actions

    # -- inside: transfers --------------------------------------------------------------------------------------------

    def _offer(self, lane: Lane, offer: Offer, now: float) -> list[DestinationAction]:
        transfer_id = offer.transfer_id
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.state is State.EXPECTED:
            return transfer.offered(lane.number, offer.prompt_tokens)
        if transfer is not None or transfer_id in self._parking or self._closed.has(transfer_id, now):
            return [Send(lane.number, Refused(transfer_id, RefusedReason.CLOSED, f"Transfer id {transfer_id} was used before."))]
        if self._parking.full:
            return self._turn_away(lane.number, transfer_id, "Too many Offers wait for their Decode already.", now)
        self._parking.add(transfer_id, lane.number, offer.prompt_tokens, now)
        return []

    def _nearly_done(self, lane: Lane, transfer_id: str) -> list[DestinationAction]:
        self._parking.nearly_done(lane.number, transfer_id)
        transfer = self._transfers.get(transfer_id)
        waits = transfer is not None and transfer.state is State.OFFERED and transfer.lane == lane.number
        return [TellNearlyDone(transfer_id)] if waits else []

    def _turn_away(self, lane: int, transfer_id: str, message: str, now: float) -> list[DestinationAction]:
        self._closed.add(transfer_id, now)
        return [Send(lane, Refused(transfer_id, RefusedReason.UNKNOWN, message))]

    def _receipt_on(self, lane: Lane, transfer_id: str) -> tuple[Transfer, Receipt] | None:
        transfer = self._transfers.get(transfer_id)
        return (transfer, transfer.receipt) if transfer and transfer.receipt and transfer.lane == lane.number else None

    def _ready(self, lane: Lane, ready: Ready, now: float) -> list[DestinationAction]:
        """A piece of another epoch, or of a transfer that has ended, is not looked at; what is sent all the same is received. One whose
        size cannot be told would leave a pair out of step."""
        assert lane.hello is not None
        fault = size_fault(ready, lane.routes, slot_bytes(lane.hello.layout)) if lane.two_sided else None
        if fault is not None:
            return self._hang_up(lane.number, f"Piece {ready.seq} of {ready.transfer_id} cannot be received: {fault}.", now)
        found = self._receipt_on(lane, ready.transfer_id)
        if found is None or found[1].epoch != ready.epoch:
            return lane.passes(ready)
        transfer, receipt = found
        fault = receipt.piece(ready, now) or (None if lane.two_sided else place_fault(ready, lane.hello.layout, self._slots))
        if fault is not None:
            return [*self._reject(transfer, f"Piece {ready.seq} is wrong: {fault}.", now), *lane.passes(ready)]
        transfer.lease_until = now + self._lease_s
        return [lane.takes(ready, receipt)]

    def _commit(self, lane: Lane, commit: Commit, now: float) -> list[DestinationAction]:
        found = self._receipt_on(lane, commit.transfer_id)
        if found is None:
            return []
        transfer, receipt = found
        if (fault := receipt.close(commit)) is not None:
            return self._reject(transfer, f"The Commit is wrong: {fault}.", now)
        transfer.lease_until = None
        return self._perhaps_commit(transfer, receipt, now)

    def _perhaps_commit(self, transfer: Transfer, receipt: Receipt, now: float) -> list[DestinationAction]:
        if not receipt.complete:
            return []
        del self._transfers[transfer.transfer_id]
        self._closed.add(transfer.transfer_id, now)
        return transfer.committed(receipt, now)

    def _cancelled_by_peer(self, lane: Lane, message: Cancel, now: float) -> list[DestinationAction]:
        if self._parking.take_from(lane.number, message.transfer_id):
            self._closed.add(message.transfer_id, now)
        transfer = self._transfers.get(message.transfer_id)
        if transfer is None or transfer.lane != lane.number:
            return []
        return self._fail(transfer, Cancelled(message.reason), now, say=None)

    def _renew(self, lane: Lane, message: KeepAlive, now: float) -> list[DestinationAction]:
        for transfer_id in message.transfer_ids:
            found = self._receipt_on(lane, transfer_id)
            if found is not None and found[1].commit is None:
                found[0].lease_until = now + self._lease_s
        return []

    def _lease_over(self, transfer: Transfer, now: float) -> list[DestinationAction]:
        """A peer that said nothing at all for the lease may be stopped: its lane ends too, and it finds that out when it wakes."""
        if transfer.state is not State.GRANTED:
            return []
        message = f"Neither piece nor KeepAlive came within the lease of {self._lease_s:g} s."
        if now - self._lanes[transfer.lane].heard_at >= self._lease_s:
            return self._hang_up(transfer.lane, message, now)
        return self._reject(transfer, message, now)

    def _reject(self, transfer: Transfer, message: str, now: float) -> list[DestinationAction]:
        refused = Refused(transfer.transfer_id, RefusedReason.FAILED, message)
        return self._fail(transfer, TransferFailed(message), now, say=refused)

    def _fail(self, transfer: Transfer, error: DiptychError, now: float, *, say: LaneMessage | None) -> list[DestinationAction]:
        """Terminal: what was granted waits for its fence, what was not is released at once."""
        if transfer.state is State.FENCING:
            return []
        actions: list[DestinationAction] = [Send(transfer.lane, say)] if say is not None and transfer.lane in self._lanes else []
        self._closed.add(transfer.transfer_id, now)
        actions.append(TellFailed(transfer.transfer_id, error))
        if transfer.state is State.GRANTED:
            transfer.state, transfer.fencing = State.FENCING, set(range(self._layout.ranks))
            transfer.receipt = None
            transfer.lease_until = None
            return [*actions, Fence(transfer.transfer_id, lane=transfer.lane)]
        del self._transfers[transfer.transfer_id]
        return [*actions, TellReleased(transfer.transfer_id)]
