"""What a router and a worker say on their one stream: commands up, one `StepEvents` down per engine step.

Every command that opens an attempt is answered by exactly one terminal event for it: `HandedOver`, `Finished` or `Failed`.
A `Stop` for an attempt also ends in a terminal event (`Failed` with `Cancelled`, unless another was already under way).
Closing the stream stops every attempt on it, without further events.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import DiptychError
from .request import FinishReason, Request, Token


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute the prompt's KV, draw the first token, hand the KV to `destination` (a worker's address, host:port).

    `destination` None: nobody decodes this (max_tokens 1); the attempt ends with `Finished`.
    """

    attempt_id: str
    request: Request
    destination: str | None


@dataclass(frozen=True, slots=True)
class Decode:
    """Write the answer: after the transfer named `attempt_id`, or, with `local_prefill`, after computing the prompt here."""

    attempt_id: str
    request: Request
    local_prefill: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """Give the attempt up: at the next step nothing of it is computed, and its blocks return."""

    attempt_id: str


Command = Prefill | Decode | Stop


@dataclass(frozen=True, slots=True)
class FirstToken:
    """From P, at once when drawn. `finish` is set if this token ends the request (then P cancels the transfer itself).

    Seconds, measured on P: `queued` from command to first chunk, `computed` from first chunk to this token.
    `cached_tokens` of the prompt came from P's prefix cache.
    """

    attempt_id: str
    token: Token
    finish: FinishReason | None = None
    queued: float = 0.0
    computed: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class HandedOver:
    """From P, terminal: D has acknowledged the Commit."""

    attempt_id: str
    kv_bytes: int
    seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class NewTokens:
    """From D (and from P never): tokens in order of index. A stop token is not among them."""

    attempt_id: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: the output is complete. `recomputed_tokens` were prefilled here after preemption, `local_prefill_tokens` by request;
    `cached_tokens` of the prompt came from this worker's prefix cache."""

    attempt_id: str
    finish: FinishReason
    cached_tokens: int = 0
    local_prefill_tokens: int = 0
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: this attempt gives nothing more."""

    attempt_id: str
    error: DiptychError


Event = FirstToken | HandedOver | NewTokens | Finished | Failed


@dataclass(frozen=True, slots=True)
class StepEvents:
    """All that one engine step has to say to one router, in order."""

    events: tuple[Event, ...]
