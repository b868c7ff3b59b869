"""A request as router and workers speak of it: token ids, never text."""

from __future__ import annotations

import re
import secrets
from dataclasses import field
from enum import StrEnum

from .sampling import SamplingParams
from .value import value


@value
class Tokens:
    """A run of prompt token ids. (Media will be another kind of part.)"""

    ids: tuple[int, ...]


Part = Tokens


@value
class Slo:
    """Latency objectives in seconds; None where the client stated none."""

    ttft: float | None = None
    tpot: float | None = None


@value
class Request:
    """What a worker is asked to continue.

    `generated[i]` are the output tokens of choice i that the client already has (a retry resumes after them): the next token of
    that choice has output index `len(generated[i])`. Empty: nobody has anything yet. `finished`: choices that have ended already.
    """

    request_id: str
    model: str
    prompt: tuple[Part, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated: tuple[tuple[int, ...], ...] = ()
    finished: frozenset[int] = frozenset()
    adapter: str = ""
    tenant: str = ""
    priority: int = 0
    slo: Slo = field(default_factory=Slo)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        if len(self.prompt) == 1:
            return self.prompt[0].ids
        return tuple(token for part in self.prompt for token in part.ids)

    def generated_by(self, choice: int) -> tuple[int, ...]:
        """The output tokens of `choice` that the client already has."""
        return self.generated[choice] if self.generated else ()

    @property
    def live(self) -> tuple[int, ...]:
        """The choices still to be written, ascending."""
        if not self.finished:
            return tuple(range(self.sampling.n))
        return tuple(choice for choice in range(self.sampling.n) if choice not in self.finished)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What the choices share, and a prefill worker computes: the prompt, and with one choice also what it has generated."""
        return self.prompt_ids + self.generated_by(0) if self.sampling.n == 1 else self.prompt_ids

    @property
    def opening(self) -> tuple[int, ...]:
        """The live choices whose next token is drawn behind `token_ids`. (The others have tokens of their own behind them, which
        the decode worker computes.)"""
        return self.live if self.sampling.n == 1 else tuple(choice for choice in self.live if not self.generated_by(choice))

    @property
    def left(self) -> int:
        """The most tokens any live choice may still write."""
        if not self.generated and not self.finished:
            return self.sampling.max_tokens
        return max((self.sampling.max_tokens - len(self.generated_by(choice)) for choice in self.live), default=0)


class FinishReason(StrEnum):
    """Why the output ended. `stop`: an end token or stop string; `length`: max_tokens or the end of the context."""

    STOP = "stop"
    LENGTH = "length"


@value
class Token:
    """One output token. `index` counts output tokens from 0. `top` are (id, logprob) pairs, likeliest first."""

    index: int
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    choice: int = 0


MAX_REQUEST_ID = 128
_STRANGE = re.compile(r"[^A-Za-z0-9._:/+=@-]+")
"""What an id in a log line, a header or a query need not hold."""


def request_id_of(said: str | None) -> str:
    """The id that a client gave its request, without strange characters and at most `MAX_REQUEST_ID` long; a fresh one, 24 hex digits,
    if there is nothing left of it."""
    return _STRANGE.sub("", said or "")[:MAX_REQUEST_ID] or secrets.token_hex(12)


def new_attempt_id() -> str:
    """A fresh 128-bit id, 32 hex digits; names one attempt and, if it moves KV, its transfer."""
    return secrets.token_hex(16)


def new_incarnation() -> int:
    """A fresh random 64-bit number; a worker that restarts is another incarnation."""
    return secrets.randbits(64)
