"""Which prompts a prefill worker computes next. Pure: commands and outputs in, decisions out; times are passed in.

    add ──▶ waiting ──decide──▶ running ──last chunk complete──▶ leased ──release──▶ gone
               │                   │                                │
               └── cancel: gone    └── cancel: leased if offered    └── cancel: nothing more to do

A prompt is offered to its destination when its first chunk is decided (`Decision.started`). From then on its blocks stay
held until `release`, which the loop calls when the source says that the transfer has ended and nothing reads them any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.commands import Finished, FirstToken, Prefill
from ..core.request import Request
from ..engine.batch import Batch, StepOutput
from ..engine.block_pool import BlockPool
from ..worker.load import Load


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt whose first chunk is in this decision. With a `destination` the loop offers it there now, and may tell the
    source at once that positions [0, cached_tokens), which need no computing, lie in `tables` (all layers)."""

    attempt_id: str
    destination: str | None
    prompt_tokens: int
    cached_tokens: int
    tables: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """One step. `attempts[i]` names whose `batch.rows[i]` is; the row computes positions [row.start, row.start + row.length)
    of that attempt into `row.tables`."""

    batch: Batch
    attempts: tuple[str, ...]
    started: tuple[Started, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a completed step means.

    `first_tokens`: prompts that are now whole, each with its first token. Where `finish` is None, the loop commits the transfer
    with it. A `finish` of STOP means that the token is an end token and no output.
    `finished`: terminal events, for prompts without a destination and for those whose first token ended the request; of the
    latter the loop cancels the transfer, and `release` follows as for any other.
    """

    first_tokens: tuple[FirstToken, ...] = ()
    finished: tuple[Finished, ...] = ()


class PrefillScheduler:
    """First come, first served; at most `chunk_tokens` positions a step over all rows; cached prefixes are skipped.

    What cannot start now (memory, or its destination's share) is passed by later prompts a bounded number of times. KV that
    one destination has not yet granted fills at most half of the pool (one prompt alone may be larger).
    `max_running`: slots of the engine; rows of a batch. `step` counts from 0, as the engine does.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        root_hash_of: Callable[[Request], bytes],
        chunk_tokens: int,
        max_running: int,
        max_context: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        raise NotImplementedError

    def add(self, prefill: Prefill, now: float) -> None:
        """Queue a prompt. Raises `ContextExceeded` if it can never fit, `InvalidRequest` if it is empty or its id is in use."""
        raise NotImplementedError

    def granted(self, attempt_id: str) -> None:
        """The destination has granted: the attempt no longer counts against its share. Unknown ids are ignored."""
        raise NotImplementedError

    def cancel(self, attempt_id: str, now: float) -> bool:
        """Compute nothing more of it. True if it was offered and its blocks stay held until `release` (the loop cancels the
        transfer); False if nothing of it is left here (unknown ids included)."""
        raise NotImplementedError

    def release(self, attempt_id: str, now: float) -> None:
        """The transfer has ended and nothing reads the blocks any more: give them back. In any state; unknown ids are ignored."""
        raise NotImplementedError

    def decide(self, now: float) -> Decision | None:
        """The next step, or None if nothing can be computed before something else happens. May be called with steps in flight."""
        raise NotImplementedError

    def complete(self, output: StepOutput, now: float) -> PrefillOutcome:
        """The oldest step in flight has completed."""
        raise NotImplementedError

    def load(self, now: float) -> Load:
        raise NotImplementedError

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        raise NotImplementedError
