"""How much of a prompt one step computes."""

from __future__ import annotations


def chunk_stop(start: int, stop: int, budget: int, block_size: int) -> int:
    """Where the chunk that begins at `start` ends: at the prompt's end `stop` if at most `budget` positions are left, else at
    the last block boundary within the budget, so that every chunk but the last fills whole blocks. `start`: no chunk fits."""
    if stop - start <= budget:
        return stop
    return max(start, (start + budget) // block_size * block_size)
