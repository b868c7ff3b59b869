"""What a request's machine wants done."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.commands import Command
from ..core.errors import DiptychError
from ..core.request import FinishReason, Token
from .placement import Demand


@dataclass(frozen=True, slots=True)
class Place:
    """Wanted: `placed` or `unplaceable`. `cause` is the failure that makes it a retry; None if nothing has failed, or it was
    counted before."""

    demand: Demand
    cause: DiptychError | None


@dataclass(frozen=True, slots=True)
class Move:
    """Wanted, if there is a place for it now: `moved`. Else the attempt goes on where it is, at a worker that leaves or has too much."""

    attempt_id: str
    demand: Demand


@dataclass(frozen=True, slots=True)
class Send:
    worker_id: str
    command: Command


@dataclass(frozen=True, slots=True)
class Emit:
    """The next tokens of one choice, in order."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Nothing follows of this choice."""

    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Succeed:
    """Every choice has ended, and all is known of how."""


@dataclass(frozen=True, slots=True)
class Fail:
    error: DiptychError


Action = Place | Move | Send | Emit | End | Succeed | Fail
