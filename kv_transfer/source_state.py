"""What the source's machine knows of one transfer and of one lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..core.layout import Layout
from ..core.request import Token
from ..core.transfer import Commit, Epoch, LaneMessage, NearlyDone, Offer, Ready, Transport
from .coverage import Coverage, Span, blocks_of
from .staging import Staging


class State(StrEnum):
    OFFERED = "offered"
    GRANTED = "granted"
    COMMITTED = "committed"
    FENCING = "fencing"


@dataclass(slots=True)
class Transfer:
    transfer_id: str
    lane: int
    prompt_tokens: int
    slot: int
    computed: Coverage
    state: State = State.OFFERED
    tables: tuple[tuple[int, ...], ...] = ()
    nearly_done: bool = False
    """Whether a layer is stored up to the prompt's end."""
    epoch: Epoch | None = None
    announced: Coverage | None = None
    pieces: int = 0
    first_tokens: tuple[Token, ...] | None = None
    acked_by: float | None = None

    def opening(self) -> list[LaneMessage]:
        """What is said of it on a lane that has just opened."""
        offer = Offer(self.transfer_id, self.prompt_tokens)
        return [offer, NearlyDone(self.transfer_id)] if self.nearly_done else [offer]

    def blocks(self, span: Span, block_size: int) -> tuple[int, ...]:
        """Those that hold `span`, as far as the source has them."""
        return self.tables[span.group][span.start // block_size : -(-span.stop // block_size)]

    def lacks(self, span: Span, layout: Layout) -> str | None:
        """None if the source holds `span`; else words for the Grant that asks for it."""
        blocks = self.blocks(span, layout.block_size)
        if len(blocks) == blocks_of(span, layout.block_size) and min(blocks) >= 0:
            return None
        return f"The Grant asks for positions from {span.start} of cache group {span.group}, which the source does not hold."

    def ready(self, span: Span, blocks: tuple[int, ...] = (), slot: int = 0, word: int = 0, *, checksum: int = 0) -> Ready:
        """The announcement of the next piece."""
        assert self.epoch is not None
        seq = self.pieces
        self.pieces += 1
        return Ready(self.transfer_id, self.epoch, seq, span.group, span.layers, span.start, span.stop, blocks, slot, word, checksum)

    def commit(self, acked_by: float) -> Commit:
        assert self.first_tokens is not None
        self.state = State.COMMITTED
        self.acked_by = acked_by
        return Commit(self.transfer_id, self.pieces, self.first_tokens)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert (self.acked_by is not None) == (self.state is State.COMMITTED), "only a Commit waits for an Ack"
        assert self.state in (State.OFFERED, State.FENCING) or self.announced is not None


def granted_by_lane(transfers: Mapping[str, Transfer]) -> dict[int, tuple[str, ...]]:
    """The transfers granted and not yet committed."""
    granted: dict[int, tuple[str, ...]] = {}
    for transfer in transfers.values():
        if transfer.state is State.GRANTED:
            granted[transfer.lane] = (*granted.get(transfer.lane, ()), transfer.transfer_id)
    return granted


@dataclass(slots=True)
class Lane:
    number: int
    address: str
    heard_at: float
    opened_by: float | None
    """None once the peer's Hello has come."""
    layout: Layout | None = None
    """The peer's."""
    transport: Transport | None = None
    """The one the peer has chosen."""
    staging: Staging | None = None
    """Of a two-sided transport's pair."""
    transfers: set[str] = field(default_factory=set)

    def announces_all(self, transfer: Transfer) -> bool:
        """Whether every piece of the transfer is announced."""
        assert transfer.announced is not None
        return transfer.announced.complete and not (self.staging is not None and self.staging.filling(transfer.transfer_id))

    def check(self, transfers: Mapping[str, Transfer]) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert all(transfers[transfer_id].lane == self.number for transfer_id in self.transfers)
        if self.staging is not None:
            self.staging.check()
