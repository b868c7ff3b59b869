"""What the source's machine knows of one transfer and of one lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..core.layout import Layout
from ..core.request import Token
from ..core.transfer import Commit, Epoch, Grant, Hello, LaneMessage, NearlyDone, Offer, Ready, Transport
from .coverage import Coverage, Span, blocks_of
from .slices import Route, first_positions, routes
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
    computed: tuple[Coverage, ...]
    """By each rank."""
    state: State = State.OFFERED
    tables: tuple[tuple[int, ...], ...] = ()
    """As they were when position `reached` was computed, the last one of which any rank has stored something."""
    reached: int = 0
    nearly_done: bool = False
    """Whether a layer is stored up to the prompt's end."""
    epoch: Epoch | None = None
    announced: tuple[Coverage, ...] = ()
    """On each route, from the Grant on."""
    fencing: set[int] = field(default_factory=set)
    """The ranks that have not answered the fence."""
    pieces: int = 0
    first_tokens: tuple[Token, ...] | None = None
    acked_by: float | None = None

    def stored(self, rank: int, layers: tuple[int, ...], start: int, stop: int, tables: tuple[tuple[int, ...], ...]) -> None:
        """As `SourceMachine.computed`; `ValueError` if positions come out of order. A rank may be a step behind another: its tables lack
        what of a window group that other has stored, and hold nothing that is announced and not in the newer ones."""
        self.computed[rank].extend(layers, start, stop)
        if stop >= self.reached:
            self.tables, self.reached = tables, stop

    def opening(self) -> list[LaneMessage]:
        """What is said of it on a lane that has just opened."""
        offer = Offer(self.transfer_id, self.prompt_tokens)
        return [offer, NearlyDone(self.transfer_id)] if self.nearly_done else [offer]

    def granted(self, grant: Grant, lane: Lane, ours: Layout) -> None:
        self.state, self.epoch = State.GRANTED, grant.epoch
        firsts = first_positions(ours, grant.groups, self.prompt_tokens)
        self.announced = tuple(Coverage(route.groups, firsts, self.prompt_tokens) for route in lane.routes)

    def blocks(self, span: Span, block_size: int) -> tuple[int, ...]:
        """Those that hold `span`, as far as the source has them."""
        return self.tables[span.group][span.start // block_size : -(-span.stop // block_size)]

    def lacks(self, span: Span, layout: Layout) -> str | None:
        """None if the source holds `span`; else words for the Grant that asks for it."""
        blocks = self.blocks(span, layout.block_size)
        if len(blocks) == blocks_of(span, layout.block_size) and min(blocks) >= 0:
            return None
        return f"The Grant asks for positions from {span.start} of cache group {span.group}, which the source does not hold."

    def ready(self, route: int, span: Span, blocks: tuple[int, ...] = (), slot: int = 0, word: int = 0) -> Ready:
        """The announcement of the next piece."""
        assert self.epoch is not None
        seq = self.pieces
        self.pieces += 1
        group, layers, start, stop = span.group, span.layers, span.start, span.stop
        return Ready(self.transfer_id, self.epoch, seq, group, layers, start, stop, blocks, slot, word, route)

    def commit(self, acked_by: float) -> Commit:
        assert self.first_tokens is not None
        self.state = State.COMMITTED
        self.acked_by = acked_by
        return Commit(self.transfer_id, self.pieces, self.first_tokens)

    def fenced_by(self, rank: int) -> bool:
        """`rank` has answered the fence: whether that was the last answer due."""
        self.fencing.discard(rank)
        return self.state is State.FENCING and not self.fencing

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert (self.acked_by is not None) == (self.state is State.COMMITTED), "only a Commit waits for an Ack"
        assert self.state in (State.OFFERED, State.FENCING) or self.announced
        assert bool(self.fencing) == (self.state is State.FENCING), "fencing waits for ranks"


@dataclass(slots=True)
class Lane:
    number: int
    address: str
    heard_at: float
    opened_by: float | None
    """None once the peer's Hello has come."""
    layout: Layout | None = None
    """The peer's."""
    routes: tuple[Route, ...] = ()
    transport: Transport | None = None
    """The one the peer has chosen."""
    stagings: tuple[Staging, ...] = ()
    """Of a two-sided transport's pairs, one for each route."""
    transfers: set[str] = field(default_factory=set)

    def opened(self, hello: Hello, ours: Layout) -> None:
        """The peer has said `hello`, with one transport."""
        self.opened_by, self.layout, self.transport = None, hello.layout, hello.transports[0]
        self.routes = routes(ours, hello.layout)
        self.stagings = tuple(Staging() for _ in self.routes) if self.transport.two_sided else ()

    def announces_all(self, transfer: Transfer) -> bool:
        """Whether every piece of the transfer is announced."""
        return all(announced.complete for announced in transfer.announced)

    def check(self, transfers: Mapping[str, Transfer]) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert all(transfers[transfer_id].lane == self.number for transfer_id in self.transfers)
        for staging in self.stagings:
            staging.check()
