"""What the destination's machine knows of one transfer and of one lane."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from ..core.layout import Layout
from ..core.transfer import Ack, Grant, Hello, Ready, Transport
from .actions import Attach, Connect, Copy, DestinationAction, Receive, Send, TellCommitted, TellNearlyDone, TellOffered
from .coverage import Span
from .receipt import Receipt
from .slices import Route, routes


class State(StrEnum):
    EXPECTED = "expected"
    OFFERED = "offered"
    GRANTED = "granted"
    FENCING = "fencing"


@dataclass(slots=True)
class Transfer:
    transfer_id: str
    state: State = State.EXPECTED
    lane: int = 0
    prompt_tokens: int = 0
    receipt: Receipt | None = None
    """From the grant on."""
    lease_until: float | None = None
    fencing: set[int] = field(default_factory=set)
    """The ranks that have not answered the fence."""

    def offered(self, lane: int, prompt_tokens: int, *, nearly_done: bool = False) -> list[DestinationAction]:
        """The source on `lane` has offered it."""
        self.state, self.lane, self.prompt_tokens = State.OFFERED, lane, prompt_tokens
        told = [TellOffered(self.transfer_id, prompt_tokens)]
        return [*told, TellNearlyDone(self.transfer_id)] if nearly_done else [*told]

    def granted(self, grant: Grant, lane: Lane, ours: Layout, *, lease_until: float) -> None:
        assert lane.hello is not None
        self.state, self.lease_until = State.GRANTED, lease_until
        self.receipt = Receipt(ours, lane.hello.layout, lane.routes, grant.epoch, grant.groups, self.prompt_tokens)

    def fenced_by(self, rank: int) -> bool:
        """`rank` has answered the fence: whether that was the last answer due."""
        self.fencing.discard(rank)
        return self.state is State.FENCING and not self.fencing

    def committed(self, receipt: Receipt, now: float) -> list[DestinationAction]:
        """What is said when every piece is counted."""
        assert receipt.commit is not None
        kv_bytes, seconds = receipt.kv_bytes, now - receipt.first_piece_at if receipt.first_piece_at is not None else 0.0
        told = TellCommitted(self.transfer_id, receipt.commit.first_tokens, kv_bytes, seconds, receipt.lacking)
        return [told, Send(self.lane, Ack(self.transfer_id, kv_bytes, seconds))]

    def check(self, lanes: set[int]) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        granted = self.state is State.GRANTED
        assert self.state in (State.EXPECTED, State.FENCING) or self.lane in lanes, "what is offered has a lane"
        assert granted == (self.receipt is not None), "a grant, and nothing else, has a receipt"
        assert bool(self.fencing) == (self.state is State.FENCING), "fencing waits for ranks"
        waiting = self.receipt is not None and self.receipt.commit is None
        assert (self.lease_until is not None) == waiting, "a grant without Commit, and nothing else, has a lease"
        assert self.receipt is None or not self.receipt.complete, "what is complete is committed"


@dataclass(slots=True)
class Lane:
    number: int
    heard_at: float
    hello: Hello | None = None
    opened_by: float | None = None
    """None once our own Hello was said."""
    choices: tuple[Transport, ...] = ()
    """From the peer's Hello on: the transport in use, or being tried, and those to try after it."""
    routes: tuple[Route, ...] = ()
    attaching: set[int] = field(default_factory=set)
    """The ranks that have not yet answered that they can copy from the source."""

    def introduced(self, hello: Hello, ours: Layout) -> None:
        self.hello, self.routes = hello, routes(hello.layout, ours)
        self.attaching = set(range(ours.ranks))

    def try_transport(self, ours: Hello, instead: str) -> list[DestinationAction]:
        """Make the first of the transports that are left work, of which there is one; `instead`: why the one before it does not."""
        assert self.hello is not None
        transport = self.choices[0]
        if transport.two_sided:
            return [*self._open(ours), Connect(self.number, self.hello, transport, instead)]
        return [Attach(self.number, self.hello, transport)]

    def attached(self, rank: int, ours: Hello) -> list[DestinationAction]:
        """`rank` can copy from the source; when all can, the source's Hello is answered."""
        if rank not in self.attaching:
            return []
        self.attaching.remove(rank)
        return [] if self.attaching else self._open(ours)

    def next_transport(self) -> bool:
        """The one that was tried does not work: whether there is another."""
        self.attaching.clear()
        self.choices = self.choices[1:]
        return bool(self.choices)

    def _open(self, ours: Hello) -> list[DestinationAction]:
        """Answer with the transport chosen."""
        self.opened_by = None
        return [Send(self.number, replace(ours, transports=self.choices[:1]))]

    @property
    def two_sided(self) -> bool:
        """Whether what the source announces comes by itself."""
        return self.choices[0].two_sided

    def takes(self, ready: Ready, receipt: Receipt) -> Copy | Receive:
        """What puts the piece into the blocks granted."""
        span = Span(ready.group, ready.layers, ready.start, ready.stop)
        into = receipt.into(span)
        if self.two_sided:
            return Receive(self.number, ready.transfer_id, ready.seq, span, into, ready.route)
        return Copy(self.number, ready.transfer_id, ready.seq, span, ready.blocks, into, ready.slot, ready.word, ready.route)

    def passes(self, ready: Ready) -> list[DestinationAction]:
        """What becomes of a piece that nobody wants."""
        span = Span(ready.group, ready.layers, ready.start, ready.stop)
        return [Receive(self.number, ready.transfer_id, ready.seq, span, None, ready.route)] if self.two_sided else []
