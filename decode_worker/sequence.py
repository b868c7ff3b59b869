"""One choice of an attempt on a decode worker, as its scheduler sees it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from ..core.commands import Decode
from ..core.errors import ContextExceeded, InvalidRequest
from ..core.request import FinishReason, Request
from ..engine.block_pool import BlockPool, BlockTable


@dataclass(slots=True, eq=False)
class Tally:
    """Positions computed for all choices of an attempt: of its prompt, by request; again, or of what the client has already."""

    local_prefill_tokens: int = 0
    recomputed_tokens: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens`: prompt and output as far as known; `pending` more are drawn by steps in flight. `limit`: tokens at which it ends.

    `shared`: it still stands for all choices of its attempt, and `tokens` is what these share; whoever is in `stopped` is not to be
    written. When that is computed the choices part, and each is a sequence of its own (`choice` counts for it from then on).

    `decided`: positions computed once the steps in flight complete; `done`: positions computed. `target`: positions below it are
    computed in chunks (a local prompt, what a preemption threw away, or what the client has of a choice); `cached`: of the prompt,
    found in the prefix cache. `order`: counts sequences as they start to run; the highest is the youngest. `slot`: -1 while it has
    none. `passes`: how many later ones have been given memory before it. `nearly_done`: whether its source has said so. `preempted`:
    it waits for memory, or what it computes in chunks counts as recomputed.
    """

    attempt_id: str
    request: Request
    local_prefill: bool
    tokens: list[int]
    prompt_tokens: int
    limit: int
    stop_ids: frozenset[int]
    table: BlockTable
    shared: bool
    choice: int = 0
    stopped: set[int] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)
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

    @property
    def length(self) -> int:
        """Tokens once the steps in flight complete."""
        return len(self.tokens) + self.pending

    @property
    def decoding(self) -> bool:
        """Whether nothing is left to compute in chunks: each step computes its last token and draws the next."""
        return self.decided >= self.target

    def resume(self, shared: int) -> None:
        """Behind `shared` tokens, of which the KV is here, it has one more token to decode, or several to compute first."""
        self.target = len(self.tokens) - 1
        self.preempted = self.preempted or self.target > shared

    def finish_of(self, token_id: int, before: int) -> FinishReason | None:
        """The reason if this token, behind `before` others, ends the output."""
        if token_id in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if before + 1 >= self.limit else None


def by_age(sequence: Sequence) -> int:
    """Sort key: oldest first."""
    return sequence.order


def sequence_of(
    decode: Decode, pool: BlockPool, hashes_of: Callable[[Request, Seq[int]], list[bytes]], *, longest: int, eos: frozenset[int]
) -> Sequence:
    """What stands for a new attempt. Raises `ContextExceeded` if it can never fit into `longest` tokens, `InvalidRequest` if its prompt
    is empty or it has nothing left to write."""
    request, sampling = decode.request, decode.request.sampling
    token_ids, prompt_tokens = request.token_ids, len(request.prompt_ids)
    if not prompt_tokens:
        raise InvalidRequest("The prompt has no token.", field="prompt")
    if request.left < 1:
        raise InvalidRequest("All of max_tokens is generated already.", field="max_tokens")
    most = prompt_tokens + (max(len(request.generated_by(choice)) for choice in request.live) if request.generated else 0)
    if most >= longest:
        raise ContextExceeded(f"The prompt has {most} tokens; with one of output this decode worker holds {longest}.", field="prompt")
    return Sequence(
        decode.attempt_id,
        request,
        decode.local_prefill,
        list(token_ids),
        prompt_tokens,
        limit=min(prompt_tokens + sampling.max_tokens, longest),
        stop_ids=sampling.ends(eos),
        table=pool.open(hashes_of(request, token_ids)),
        shared=sampling.n > 1,
    )
