"""What a query of a cache group sees, in positions and blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Paging:
    """The shape of a cache group: `window` 0 is full attention, w lets query q see keys k with q - w < k <= q."""

    kv_heads: int
    block_size: int
    window: int

    def first_key(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        return max(0, position - self.window + 1) if self.window else 0

    def first_block(self, position: int) -> int:
        """The first block with a key that a query at `position` sees."""
        return self.first_key(position) // self.block_size

    def sees(self, queries: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which queries see which keys; positions, broadcast against each other."""
        causal = keys <= queries
        return causal & (keys > queries - self.window) if self.window else causal


def padded(runs: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Rows of blocks as one table, [rows, the longest]; what fills it is never read."""
    table = np.zeros((len(runs), max(map(len, runs))), dtype=np.int64)
    for row, run in enumerate(runs):
        table[row, : len(run)] = run
    return table
