"""One step, as a value: what the engine computes and what it answers. The engine knows no request."""

from __future__ import annotations

from ..core.sampling import SamplingParams
from ..core.value import value

NO_BLOCK = -1
"""In a window group's table: the block has left the window and was given back."""


@value
class Draw:
    """Draw output token `index` of `choice` from the row's last position.

    `history`, for penalties: prompt and output, the last `index` tokens the output. A row without token ids has none: its history
    is that of the draw before in its slot, and the token then drawn. `banned`: ids that cannot be drawn.
    """

    sampling: SamplingParams
    index: int
    choice: int = 0
    history: tuple[int, ...] = ()
    banned: frozenset[int] = frozenset()


@value
class Row:
    """Compute positions [start, start + length) of one sequence, and draw from the last of them, once for each of `draws`.

    `token_ids` empty means one position, whose token is the last one drawn in `slot` (perhaps by a step still in flight), by the
    first of its row's draws. `tables[g][i]` is the block of cache group g that holds positions [i * block_size, (i + 1) *
    block_size); `NO_BLOCK` where the window has passed. KV of the computed positions is stored there; earlier positions are read.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    draws: tuple[Draw, ...] = ()

    @property
    def length(self) -> int:
        return len(self.token_ids) or 1


@value
class BlockCopy:
    """Block `destination` of cache group `group` becomes, in all the group's layers, what block `source` is."""

    group: int
    source: int
    destination: int


@value
class Batch:
    """Rows of one step; `step` counts an engine's batches from 0. Slots of a batch are distinct.

    `copies` are made before the rows are computed, all at once: no destination is the source of another."""

    step: int
    rows: tuple[Row, ...]
    copies: tuple[BlockCopy, ...] = ()


@value
class Drawn:
    """A token drawn; `logprob` and `top` only if they were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@value
class StepOutput:
    """`drawn[i]` answers the draws of `rows[i]`, one for each. `eager`: decodes alone, launched kernel by kernel on a GPU, where a captured
    step would have been one launch."""

    step: int
    drawn: tuple[tuple[Drawn, ...], ...]
    eager: bool = False
