"""The load of a cluster's recent past, as its router saw it: how much was asked when, and how long it took. No prompt, no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Recorded(NamedTuple):
    """One request; a tuple, since thousands are made at a time.

    `age`: seconds since it came. `cached_tokens`: of its prompt, those whose KV a worker had. `output_tokens`: so far, of all its
    choices. `ttft`: None until its first token has gone out; `tpot`: None of fewer than two. `ended`: no token follows.
    """

    age: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: float | None
    tpot: float | None
    ended: bool


@dataclass(frozen=True, slots=True)
class Window:
    """Every request that came in the last `seconds`, the oldest first; those that ended before their first token are left out."""

    seconds: float
    requests: tuple[Recorded, ...]
