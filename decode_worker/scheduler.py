"""Which tokens a decode worker draws next, and to whom it lends memory. Pure: events in, decisions out; times are passed in.

    expect ─┬─ transfer: expected ──on_offer──▶ queued ──grants──▶ granted ──committed──▶ running ──▶ finished
            └─ local prefill: ───────────────▶ queued ──decide──────────────────────────▶ running ──▶ finished
                                                                  preempted ◀── memory ──────┘ └──▶ (recomputed)

Memory goes first to the growth of running requests (a watermark is kept for it), then to preempted ones, then to the queue
in order, where a smaller may pass a larger a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.commands import Decode, Finished, NewTokens
from ..core.request import Request, Token
from ..core.transfer import GroupGrant, RefusedReason
from ..engine.batch import Batch, StepOutput
from ..engine.block_pool import BlockPool
from ..worker.load import Load


@dataclass(frozen=True, slots=True)
class Decision:
    """One step. `attempts[i]` names whose `batch.rows[i]` is."""

    batch: Batch
    attempts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DecodeOutcome:
    """Events for the router: new tokens in row order, then terminal events. End tokens are not among the tokens."""

    new_tokens: tuple[NewTokens, ...] = ()
    finished: tuple[Finished, ...] = ()


class DecodeScheduler:
    """Continuous batching; prompts are computed in chunks of `chunk_tokens` positions a step (over all rows) beside the decodes.

    `max_running`: slots of the engine; requests running or granted. `watermark`: share of each group's blocks kept free of
    new work for the growth of what runs. `step` counts from 0, as the engine does. Attempt id and transfer id are the same.
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
        watermark: float = 0.05,
    ) -> None:
        raise NotImplementedError

    def expect(self, decode: Decode, now: float) -> None:
        """An attempt: its transfer will be offered, or (`local_prefill`) it is queued at once. Raises `ContextExceeded` if it can
        never fit, `InvalidRequest` if its prompt is empty or its id is in use."""
        raise NotImplementedError

    def on_offer(self, transfer_id: str, prompt_tokens: int, now: float) -> RefusedReason | None:
        """Queue an offered transfer for a grant. A reason: refuse it (CLOSED: no such attempt any more; FAILED: the offer is not
        about this attempt's prompt, and the loop fails the attempt with `transfer_failed`)."""
        raise NotImplementedError

    def grants(self, now: float) -> list[tuple[str, tuple[GroupGrant, ...]]]:
        """Transfers to grant now, with their blocks; call after every message and every completed step."""
        raise NotImplementedError

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], now: float) -> DecodeOutcome:
        """The KV is here: decode from the next step. The outcome is empty unless the first token already ended the request. For an
        attempt cancelled meanwhile the blocks return (no `fenced` follows a commit)."""
        raise NotImplementedError

    def transfer_failed(self, transfer_id: str, now: float) -> bool:
        """The transfer will not commit: the attempt is over. Granted blocks stay held until `fenced`. True if the attempt was alive,
        so that the loop owes the router a `Failed`."""
        raise NotImplementedError

    def fenced(self, transfer_id: str, now: float) -> None:
        """No copy can touch the granted blocks any more: they return. Unknown ids (never granted, committed) are ignored."""
        raise NotImplementedError

    def cancel(self, attempt_id: str, now: float) -> bool:
        """Compute nothing more of it. True if its transfer is still under way (the loop cancels it at the destination; granted
        blocks stay held until `fenced`, or `committed` if that was faster); False otherwise (unknown ids included)."""
        raise NotImplementedError

    def decide(self, now: float) -> Decision | None:
        """The next step, or None if nothing can be computed before something else happens. May be called with steps in flight: a
        row whose last token is not yet known has empty `token_ids`."""
        raise NotImplementedError

    def complete(self, output: StepOutput, now: float) -> DecodeOutcome:
        """The oldest step in flight has completed."""
        raise NotImplementedError

    def steady(self) -> int:
        """For how many steps from now the decision stays the same rows, each one position on, and no request ends, if no message
        comes and no end token is drawn. 0 with a step in flight."""
        raise NotImplementedError

    def advance(self, steps: int, token_id: int, now: float) -> tuple[str, ...]:
        """As `steps` (at most `steady()`) times `decide` and `complete`, where every row draws `token_id`: each attempt returned,
        in row order, has `steps` tokens more."""
        raise NotImplementedError

    def load(self, now: float) -> Load:
        raise NotImplementedError

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        raise NotImplementedError
