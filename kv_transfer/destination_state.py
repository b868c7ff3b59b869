"""What the destination's machine knows of one transfer and of one lane."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..core.transfer import Hello, Ready, Transport
from .actions import Copy, DestinationAction, Receive
from .coverage import Span
from .receipt import Receipt


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

    def check(self, lanes: set[int]) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        granted = self.state is State.GRANTED
        assert self.state in (State.EXPECTED, State.FENCING) or self.lane in lanes, "what is offered has a lane"
        assert granted == (self.receipt is not None), "a grant, and nothing else, has a receipt"
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

    @property
    def two_sided(self) -> bool:
        """Whether what the source announces comes by itself."""
        return self.choices[0] is Transport.GLOO

    def takes(self, ready: Ready, receipt: Receipt) -> Copy | Receive:
        """What puts the piece into the blocks granted."""
        span = Span(ready.group, ready.layers, ready.start, ready.stop)
        into = receipt.into(span)
        if self.two_sided:
            return Receive(self.number, ready.transfer_id, ready.seq, span, into, ready.checksum)
        return Copy(self.number, ready.transfer_id, ready.seq, span, ready.blocks, into, ready.slot, ready.word)

    def passes(self, ready: Ready) -> list[DestinationAction]:
        """What becomes of a piece that nobody wants."""
        span = Span(ready.group, ready.layers, ready.start, ready.stop)
        return [Receive(self.number, ready.transfer_id, ready.seq, span, None, ready.checksum)] if self.two_sided else []
