"""A request as router and workers speak of it: token ids, never text."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from .sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of prompt token ids. (Media will be another kind of part.)"""

    ids: tuple[int, ...]


Part = Tokens


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency objectives in seconds; None where the client stated none."""

    ttft: float | None = None
    tpot: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked to continue.

    `generated` are output tokens the client already has (a retry resumes after them): a worker computes KV for
    prompt + generated, and the next token it draws has output index `len(generated)`.
    """

    request_id: str
    model: str
    prompt: tuple[Part, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated: tuple[int, ...] = ()
    adapter: str = ""
    tenant: str = ""
    priority: int = 0
    slo: Slo = field(default_factory=Slo)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        if len(self.prompt) == 1:
            return self.prompt[0].ids
        return tuple(token for part in self.prompt for token in part.ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and generated tokens: what must be in the cache before the next token is drawn."""
        return self.prompt_ids + self.generated if self.generated else self.prompt_ids


class FinishReason(StrEnum):
    """Why the output ended. `stop`: an end token or stop string; `length`: max_tokens or the end of the context."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Token:
    """One output token. `index` counts output tokens from 0. `top` are (id, logprob) pairs, likeliest first."""

    index: int
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    choice: int = 0


def new_attempt_id() -> str:
    """A fresh 128-bit id, 32 hex digits; names one attempt and, if it moves KV, its transfer."""
    return secrets.token_hex(16)


def new_incarnation() -> int:
    """A fresh random 64-bit number; a worker that restarts is another incarnation."""
    return secrets.randbits(64)
