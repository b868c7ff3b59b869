"""One attempt on a decode worker, as its scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import Request
from ..engine.block_pool import BlockTable


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens`: prompt and output as far as known; `pending` more are drawn by steps in flight. `limit`: tokens at which it ends.

    `decided`: positions computed once the steps in flight complete; `done`: positions computed. `target`: positions below it are
    computed in chunks (a local prompt, or what a preemption threw away); `cached`: of the prompt, found in the prefix cache.
    `order`: counts sequences as they start to run; the highest is the youngest. `slot`: -1 while it has none.
    `passes`: how many later ones have been given memory before it. `nearly_done`: whether its source has said so.
    """

    attempt_id: str
    request: Request
    local_prefill: bool
    tokens: list[int]
    prompt_tokens: int
    limit: int
    stop_ids: frozenset[int]
    table: BlockTable
    pending: int = 0
    decided: int = 0
    done: int = 0
    target: int = 0
    cached: int = 0
    order: int = -1
    slot: int = -1
    passes: int = 0
    nearly_done: bool = False
    preempted: bool = False
    ended: bool = False
    local_prefill_tokens: int = 0
    recomputed_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens once the steps in flight complete."""
        return len(self.tokens) + self.pending

    @property
    def decoding(self) -> bool:
        """Whether nothing is left to compute in chunks: each step computes its last token and draws the next."""
        return self.decided >= self.target


def by_age(sequence: Sequence) -> int:
    """Sort key: oldest first."""
    return sequence.order
