"""Who holds which cache block. Pure bookkeeping: block numbers in and out, no tensor."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.layout import CacheGroup


class BlockPool:
    """The blocks of a worker's cache: reference counts, prefix table, eviction of the least recently used, fences.

    A block of a group is exactly one of: free; cached (no reference, found by its prefix hash, evictable); referenced (in the
    tables of one or more sequences); fenced (given back, but a step in flight may still touch it).
    """

    def __init__(self, num_blocks: Sequence[int], groups: Sequence[CacheGroup], block_size: int) -> None:
        raise NotImplementedError

    def submitted(self, step: int) -> None:
        """`step` is in flight: what is given back from now on may be touched by it. The schedulers call this."""
        raise NotImplementedError

    def completed(self, step: int) -> None:
        """`step` and all before it have completed. The schedulers call this."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        raise NotImplementedError
