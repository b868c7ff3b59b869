"""What the two machines ask of their shells. Actions are carried out in the order they are given."""

from __future__ import annotations

from ..core.errors import DiptychError
from ..core.request import Token
from ..core.transfer import Hello, LaneMessage, Transport
from ..core.value import value
from .coverage import Span


@value
class Dial:
    """Source: open a lane to `address`; answer with `dialled` or `lane_broken`. `lane` is its number, never used again."""

    lane: int
    address: str


@value
class Send:
    lane: int
    message: LaneMessage


@value
class HangUp:
    """Close the lane after what was sent on it; the machine has forgotten it already."""

    lane: int
    reason: str


@value
class Fence:
    """Every rank is to answer with `fenced` as soon as nothing can touch its part of the transfer's blocks any more.

    On the source `slot` is to be set to `word`: what the destination copies from here on it will not count. On the destination
    `lane` says whose pieces may be under way.
    """

    transfer_id: str
    slot: int = 0
    word: int = 0
    lane: int = 0


@value
class Attach:
    """Destination: every rank is to make ready to copy, by `transport`, from the worker that said `hello`, and answer with `attached`
    or `not_attached`."""

    lane: int
    hello: Hello
    transport: Transport


@value
class Connect:
    """Make a pair of `transport` for every route between us and the worker that said `hello`, in the background; each of the source's
    answers with `connected`. Whatever goes wrong with any, now or later, is told by `pair_broken`. `instead`: why no transport that
    comes earlier in the list is used."""

    lane: int
    hello: Hello
    transport: Transport
    instead: str = ""


@value
class Introduce:
    """Give the route's pair what its other end has said."""

    lane: int
    route: int
    key: str
    value: bytes


@value
class Detach:
    """Undo `Attach` or `Connect` (finished or not) after the copies and fences asked for so far."""

    lane: int


@value
class Copy:
    """Destination: copy `span` from the lane's source along `route`, then look at the epoch word; answer with `copied`.

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
    route: int


@value
class Stage:
    """Source: send piece `seq`, which lies in `blocks`, over the route's pair, in the order asked; answer with `sent`. It must not count
    unless epoch word `slot` is still `word` when it has been read."""

    lane: int
    transfer_id: str
    seq: int
    span: Span
    blocks: tuple[int, ...]
    slot: int
    word: int
    route: int


@value
class Receive:
    """Destination: receive the pair's next piece, whose size `span` gives. If `blocks` is not None, check it and, unless a fence
    was asked for, put it there, then answer with `copied`; otherwise it is received and dropped."""

    lane: int
    transfer_id: str
    seq: int
    span: Span
    blocks: tuple[int, ...] | None
    route: int


@value
class TellGranted:
    transfer_id: str


@value
class TellHandedOver:
    transfer_id: str
    kv_bytes: int
    seconds: float
    transport: Transport


@value
class TellOffered:
    transfer_id: str
    prompt_tokens: int


@value
class TellNearlyDone:
    transfer_id: str


@value
class TellCommitted:
    transfer_id: str
    first_tokens: tuple[Token, ...]
    kv_bytes: int
    seconds: float
    lacking: tuple[int, ...]


@value
class TellFailed:
    transfer_id: str
    error: DiptychError


@value
class TellReleased:
    transfer_id: str


SourceAction = (
    Dial | Send | HangUp | Connect | Introduce | Detach | Stage | Fence | TellGranted | TellHandedOver | TellFailed | TellReleased
)
DestinationAction = (
    Send
    | HangUp
    | Attach
    | Connect
    | Introduce
    | Detach
    | Copy
    | Receive
    | Fence
    | TellOffered
    | TellNearlyDone
    | TellCommitted
    | TellFailed
    | TellReleased
)
