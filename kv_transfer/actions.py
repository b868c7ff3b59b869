"""What the two machines ask of their shells. Actions are carried out in the order they are given."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import DiptychError
from ..core.request import Token
from ..core.transfer import Hello, LaneMessage
from .coverage import Span


@dataclass(frozen=True, slots=True)
class Dial:
    """Source: open a lane to `address`; answer with `dialled` or `lane_broken`. `lane` is its number, never used again."""

    lane: int
    address: str


@dataclass(frozen=True, slots=True)
class Send:
    lane: int
    message: LaneMessage


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the lane after what was sent on it; the machine has forgotten it already."""

    lane: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Answer with `fenced` as soon as nothing can touch the transfer's blocks any more.

    On the source `slot` is to be set to `word`: what the destination copies from here on it will not count.
    """

    transfer_id: str
    slot: int = 0
    word: int = 0


@dataclass(frozen=True, slots=True)
class Attach:
    """Destination: make ready to copy from the worker that said `hello`; answer with `attached` or `not_attached`."""

    lane: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Detach:
    """Destination: undo `Attach` (finished or not) after the copies and fences asked for so far."""

    lane: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Destination: copy `span` from the lane's source, then look at the epoch word; answer with `copied`.

    `source_blocks[0]` and `destination_blocks[0]` hold position `span.start`.
    """

    lane: int
    transfer_id: str
    seq: int
    span: Span
    source_blocks: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    slot: int
    word: int


@dataclass(frozen=True, slots=True)
class TellGranted:
    transfer_id: str


@dataclass(frozen=True, slots=True)
class TellHandedOver:
    transfer_id: str
    kv_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TellOffered:
    transfer_id: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TellCommitted:
    transfer_id: str
    first_tokens: tuple[Token, ...]
    kv_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TellFailed:
    transfer_id: str
    error: DiptychError


@dataclass(frozen=True, slots=True)
class TellReleased:
    transfer_id: str


SourceAction = Dial | Send | HangUp | Fence | TellGranted | TellHandedOver | TellFailed | TellReleased
DestinationAction = Send | HangUp | Attach | Detach | Copy | Fence | TellOffered | TellCommitted | TellFailed | TellReleased
