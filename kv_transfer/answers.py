"""What a rank answers to the orders of its leader, which tells the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fenced:
    """Nothing can touch the transfer's blocks on `rank` any more."""

    transfer_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class Attached:
    """`rank` of the destination has mapped every pool that it copies from."""

    lane: int
    rank: int


@dataclass(frozen=True, slots=True)
class NotAttached:
    """`rank` of the destination cannot; `message` says why."""

    lane: int
    rank: int
    message: str


@dataclass(frozen=True, slots=True)
class Copied:
    """Piece `seq` lies in the destination's blocks; with `error` it does not."""

    transfer_id: str
    seq: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Said:
    """One end of a route's pair has this to say to the other end."""

    lane: int
    route: int
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Connected:
    """The route's pair stands, at the source."""

    lane: int
    route: int


@dataclass(frozen=True, slots=True)
class Sent:
    """So many pieces (more) are sent."""

    lane: int
    route: int
    count: int


@dataclass(frozen=True, slots=True)
class PairBroken:
    """One of the lane's pairs is lost; each says so for itself."""

    lane: int
    reason: str


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A process asked for the memory of the rank's pool and got nothing."""


SourceAnswer = Fenced | Said | Connected | Sent | PairBroken | TurnedAway
DestinationAnswer = Fenced | Attached | NotAttached | Copied | Said | PairBroken
