"""The source's half of the hinge as a pure machine: calls and messages in, actions out. Time comes as `now`, in seconds.

    offered ──Grant──▶ granted ──commit()──▶ committed ──Ack──▶ fencing ──fenced()──▶ (gone, its id remembered)
       └───────────────────┴── cancel, Refused, Cancel, lane ──────▲
                               broken, no Ack for one lease

Who waits here, and until when: a lane being dialled, `HANDSHAKE_S`; an Offer, until Grant, Refused, cancel or the lane's end; a
Commit, one lease. A granted transfer waits for nobody: it says KeepAlive three times a lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..core.errors import Cancelled, DiptychError, Internal, InvalidRequest, TransferFailed
from ..core.layout import Layout
from ..core.request import Token
from ..core.transfer import Ack, Cancel, Commit, Epoch, Grant, Hello, KeepAlive, LaneMessage, Offer, Ready, Refused
from .actions import Dial, Fence, HangUp, Send, SourceAction, TellFailed, TellGranted, TellHandedOver, TellReleased
from .closed_ids import ClosedIds
from .coverage import Coverage, Span, ahead, blocks_of
from .faults import grant_fault, refusal

HANDSHAKE_S = 10.0
"""Longest time from dialling to the peer's Hello. Twice what the destination allows itself, so that its reason arrives."""
KEEP_ALIVES_PER_LEASE = 3


class _State(StrEnum):
    OFFERED = "offered"
    GRANTED = "granted"
    COMMITTED = "committed"
    FENCING = "fencing"


@dataclass(slots=True)
class _Transfer:
    transfer_id: str
    lane: int
    prompt_tokens: int
    slot: int
    computed: Coverage
    state: _State = _State.OFFERED
    tables: tuple[tuple[int, ...], ...] = ()
    epoch: Epoch | None = None
    announced: Coverage | None = None
    pieces: int = 0
    first_tokens: tuple[Token, ...] | None = None
    acked_by: float | None = None


@dataclass(slots=True)
class _Lane:
    number: int
    address: str
    heard_at: float
    opened_by: float | None
    """None once the peer's Hello has come."""
    layout: Layout | None = None
    """The peer's."""
    transfers: set[str] = field(default_factory=set)


class SourceMachine:
    """Every `offer` gives exactly one `TellHandedOver` or `TellFailed`, then exactly one `TellReleased`.

    `slots`: how many epoch words there are, and so how many transfers there may be at once.
    """

    def __init__(self, hello: Hello, lease_s: float, slots: int) -> None:
        self._hello = hello
        self._layout: Layout = hello.layout
        self._lease_s = lease_s
        self._transfers: dict[str, _Transfer] = {}
        self._closed = ClosedIds()
        self._lanes: dict[int, _Lane] = {}
        self._lane_to: dict[str, int] = {}
        self._lanes_made = 0
        self._words = [0] * slots
        self._free_slots = list(range(slots))
        self._dirty: dict[str, None] = {}
        self._keep_alive_at: float | None = None

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
        computed = Coverage(self._layout.groups, starts, prompt_tokens)
        self._transfers[transfer_id] = _Transfer(transfer_id, lane.number, prompt_tokens, self._free_slots.pop(), computed)
        lane.transfers.add(transfer_id)
        if lane.opened_by is None:
            actions.append(Send(lane.number, Offer(transfer_id, prompt_tokens)))
        return actions

    def computed(self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: tuple[tuple[int, ...], ...]) -> bool:
        """True if `announce` now has something to say. Raises `Internal` if positions come out of order."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is _State.FENCING:
            return False
        try:
            transfer.computed.extend(layers, start, stop)
        except ValueError as error:
            raise Internal(f"Transfer {transfer_id}: computed out of order: {error}.") from error
        transfer.tables = tables
        if transfer.state is _State.GRANTED:
            self._dirty[transfer_id] = None
        return bool(self._dirty)

    def announce(self, now: float) -> list[SourceAction]:
        """Ready for all that was computed since it was last called."""
        dirty, self._dirty = self._dirty, {}
        return [action for transfer_id in dirty for action in self._announce(self._transfers[transfer_id], now)]

    def commit(self, transfer_id: str, first_tokens: tuple[Token, ...], now: float) -> list[SourceAction]:
        """Raises `Internal` if some position was not computed, or on a second commit."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is _State.FENCING:
            return []
        if transfer.first_tokens is not None or not transfer.computed.complete:
            raise Internal(f"Transfer {transfer_id}: committed twice, or before all its KV was computed.")
        transfer.first_tokens = first_tokens
        return self._advance(transfer, now) if transfer.state is _State.GRANTED else []

    def cancel(self, transfer_id: str, reason: str, now: float) -> list[SourceAction]:
        transfer = self._transfers.get(transfer_id)
        return self._fail(transfer, Cancelled(reason), now, tell_peer=reason) if transfer else []

    # -- the transport ------------------------------------------------------------------------------------------------

    def fenced(self, transfer_id: str, now: float) -> list[SourceAction]:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not _State.FENCING:
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
        gone = self._forget_lane(lane)
        return self._fail_all(gone, f"The lane to {gone.address} broke: {reason}", now) if gone else []

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
            case _:
                return self._hang_up(lane, f"It said {type(message).__name__}, which a destination does not say.", now)

    # -- time ---------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` is due; None if nothing waits."""
        times = [lane.opened_by for lane in self._lanes.values()] + [t.acked_by for t in self._transfers.values()] + [self._keep_alive_at]
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
        if self._keep_alive_at is not None and self._keep_alive_at <= now:
            actions += self._keep_alive(now)
        return actions

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
            for transfer_id in lane.transfers:
                assert self._transfers[transfer_id].lane == lane.number
        for transfer in self._transfers.values():
            fencing = transfer.state is _State.FENCING
            assert fencing != (transfer.lane in self._lanes and transfer.transfer_id in self._lanes[transfer.lane].transfers)
            assert (transfer.acked_by is not None) == (transfer.state is _State.COMMITTED), "only a Commit waits for an Ack"
            assert transfer.state in (_State.OFFERED, _State.FENCING) or transfer.announced is not None
        granted = any(transfer.state is _State.GRANTED for transfer in self._transfers.values())
        assert not granted or self._keep_alive_at is not None, "a grant is kept alive"
        assert all(self._transfers[transfer_id].state is _State.GRANTED for transfer_id in self._dirty)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _stillborn(self, transfer_id: str, message: str) -> list[SourceAction]:
        return [TellFailed(transfer_id, TransferFailed(message)), TellReleased(transfer_id)]

    def _lane(self, address: str, now: float, actions: list[SourceAction]) -> _Lane:
        if address in self._lane_to:
            return self._lanes[self._lane_to[address]]
        self._lanes_made += 1
        lane = self._lanes[self._lanes_made] = _Lane(self._lanes_made, address, now, now + HANDSHAKE_S)
        self._lane_to[address] = lane.number
        actions.append(Dial(lane.number, address))
        return lane

    def _welcome(self, lane: _Lane, message: LaneMessage, now: float) -> list[SourceAction]:
        if not isinstance(message, Hello):
            return self._hang_up(lane.number, f"It said {type(message).__name__} before Hello.", now)
        refused = refusal(self._hello, message)
        if refused is not None:
            return self._hang_up(lane.number, refused.message, now)
        lane.opened_by = None
        lane.layout = message.layout
        offers = (self._transfers[transfer_id] for transfer_id in self._transfers if transfer_id in lane.transfers)
        return [Send(lane.number, Offer(transfer.transfer_id, transfer.prompt_tokens)) for transfer in offers]

    def _granted(self, lane: _Lane, grant: Grant, now: float) -> list[SourceAction]:
        transfer = self._on(lane, grant.transfer_id)
        if transfer is None:
            return [Send(lane.number, Cancel(grant.transfer_id, "The source has ended this transfer."))]
        if transfer.state is not _State.OFFERED:
            return []
        assert lane.layout is not None
        wrong = grant_fault(grant.groups, transfer.prompt_tokens, lane.layout)
        if wrong is not None:
            return self._fail(transfer, TransferFailed(f"The destination's Grant is wrong: {wrong}."), now, tell_peer=wrong)
        transfer.state = _State.GRANTED
        transfer.epoch = grant.epoch
        transfer.announced = Coverage(self._layout.groups, tuple(group.first_position for group in grant.groups), transfer.prompt_tokens)
        if self._keep_alive_at is None:
            self._keep_alive_at = now + self._lease_s / KEEP_ALIVES_PER_LEASE
        return [TellGranted(transfer.transfer_id), *self._advance(transfer, now)]

    def _advance(self, transfer: _Transfer, now: float) -> list[SourceAction]:
        """Announce what is computed and, if the first tokens are known, commit."""
        actions = self._announce(transfer, now)
        self._dirty.pop(transfer.transfer_id, None)
        if transfer.state is _State.GRANTED and transfer.first_tokens is not None:
            transfer.state = _State.COMMITTED
            transfer.acked_by = now + self._lease_s
            actions.append(Send(transfer.lane, Commit(transfer.transfer_id, transfer.pieces, transfer.first_tokens)))
        return actions

    def _announce(self, transfer: _Transfer, now: float) -> list[SourceAction]:
        assert transfer.announced is not None
        actions: list[SourceAction] = []
        for span in ahead(self._layout, transfer.computed, transfer.announced):
            ready = self._ready(transfer, span)
            if len(ready.blocks) < blocks_of(span, self._layout.block_size) or min(ready.blocks) < 0:
                message = f"The Grant asks for positions from {span.start} of cache group {span.group}, which the source does not hold."
                return [*actions, *self._fail(transfer, TransferFailed(message), now, tell_peer=message)]
            transfer.announced.extend(span.layers, span.start, span.stop)
            transfer.pieces += 1
            actions.append(Send(transfer.lane, ready))
        return actions

    def _ready(self, transfer: _Transfer, span: Span) -> Ready:
        assert transfer.epoch is not None
        size = self._layout.block_size
        return Ready(
            transfer_id=transfer.transfer_id,
            epoch=transfer.epoch,
            seq=transfer.pieces,
            group=span.group,
            layers=span.layers,
            start=span.start,
            stop=span.stop,
            blocks=transfer.tables[span.group][span.start // size : -(-span.stop // size)],
            slot=transfer.slot,
            word=self._words[transfer.slot],
        )

    def _on(self, lane: _Lane, transfer_id: str) -> _Transfer | None:
        return self._transfers[transfer_id] if transfer_id in lane.transfers else None

    def _acked(self, lane: _Lane, ack: Ack, now: float) -> list[SourceAction]:
        transfer = self._on(lane, ack.transfer_id)
        if transfer is None:
            return []
        if transfer.state is not _State.COMMITTED:
            return self._fail(transfer, TransferFailed("The destination acknowledged what was not committed."), now, tell_peer="early Ack")
        return [TellHandedOver(transfer.transfer_id, ack.kv_bytes, ack.seconds), self._fence(transfer, now)]

    def _ended_by_peer(self, lane: _Lane, transfer_id: str, error: DiptychError, now: float) -> list[SourceAction]:
        transfer = self._on(lane, transfer_id)
        return self._fail(transfer, error, now, tell_peer=None) if transfer else []

    def _unacknowledged(self, transfer: _Transfer, now: float) -> list[SourceAction]:
        """A peer that said nothing at all for the lease may be stopped: its lane ends too, so that the next Offer finds out soon."""
        if transfer.state is not _State.COMMITTED:
            return []
        lane = self._lanes[transfer.lane]
        message = f"No Ack came within the lease of {self._lease_s:g} s."
        if now - lane.heard_at >= self._lease_s:
            return self._hang_up(lane.number, message, now)
        return self._fail(transfer, TransferFailed(message), now, tell_peer=message)

    def _keep_alive(self, now: float) -> list[SourceAction]:
        granted: dict[int, list[str]] = {}
        for transfer in self._transfers.values():
            if transfer.state is _State.GRANTED:
                granted.setdefault(transfer.lane, []).append(transfer.transfer_id)
        self._keep_alive_at = now + self._lease_s / KEEP_ALIVES_PER_LEASE if granted else None
        return [Send(lane, KeepAlive(tuple(ids))) for lane, ids in granted.items()]

    def _fence(self, transfer: _Transfer, now: float) -> Fence:
        """Terminal: from here on the transfer only waits for its fence. The word is spent, whatever the end was, so that every
        transfer has a word of its own."""
        if transfer.lane in self._lanes:
            self._lanes[transfer.lane].transfers.discard(transfer.transfer_id)
        self._dirty.pop(transfer.transfer_id, None)
        self._closed.add(transfer.transfer_id, now)
        transfer.state = _State.FENCING
        transfer.acked_by = None
        self._words[transfer.slot] += 1
        return Fence(transfer.transfer_id, transfer.slot, self._words[transfer.slot])

    def _fail(self, transfer: _Transfer, error: DiptychError, now: float, *, tell_peer: str | None) -> list[SourceAction]:
        if transfer.state is _State.FENCING:
            return []
        actions: list[SourceAction] = []
        lane = self._lanes.get(transfer.lane)
        if tell_peer is not None and lane is not None and lane.opened_by is None:
            actions.append(Send(lane.number, Cancel(transfer.transfer_id, tell_peer)))
        return [*actions, TellFailed(transfer.transfer_id, error), self._fence(transfer, now)]

    def _forget_lane(self, lane: int) -> _Lane | None:
        gone = self._lanes.pop(lane, None)
        if gone is not None:
            del self._lane_to[gone.address]
        return gone

    def _hang_up(self, lane: int, reason: str, now: float) -> list[SourceAction]:
        gone = self._forget_lane(lane)
        assert gone is not None
        return [HangUp(lane, reason), *self._fail_all(gone, f"No lane to {gone.address}: {reason}", now)]

    def _fail_all(self, lane: _Lane, message: str, now: float) -> list[SourceAction]:
        mine = [transfer for transfer in self._transfers.values() if transfer.transfer_id in lane.transfers]
        return [action for transfer in mine for action in self._fail(transfer, TransferFailed(message), now, tell_peer=None)]
