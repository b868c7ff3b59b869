"""What the cache of a worker looks like: groups of layers that share a kind, cut into blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


class CacheKind(StrEnum):
    FULL = "full"
    WINDOW = "window"


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose KV has one kind and one shape; a group has its own blocks and tables.

    Per layer a group's cache is `[num_blocks, kv_heads, 2, block_size, head_dim]` of `dtype` (K is [..., 0, :, :], V is
    [..., 1, :, :]), so that a head range of a block, K and V, is one run of bytes. A window group's layers attend to the
    last `window` positions, the current one included: query q sees keys k with q - window < k <= q.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: DType
    window: int = 0

    def __post_init__(self) -> None:
        if (self.kind is CacheKind.WINDOW) != (self.window > 0):
            raise ValueError(f"a {self.kind} group has window {self.window}")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, K and V."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def first_needed(self, position: int) -> int:
        """The first position that a query at `position` sees; 0 for a full group."""
        return max(0, position - self.window + 1) if self.kind is CacheKind.WINDOW else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How one worker holds its KV. Two workers may exchange KV only if `difference` finds nothing.

    `fingerprint` identifies weights and everything else that decides what a token's KV is. `num_blocks` has one entry
    per group.
    """

    fingerprint: str
    groups: tuple[CacheGroup, ...]
    block_size: int
    num_blocks: tuple[int, ...]
    tp: int = 1
    pp: int = 1

    def difference(self, other: Layout) -> str | None:
        """The first difference that forbids a transfer, as a sentence that names it; None if there is none."""
        for name in ("fingerprint", "groups", "block_size", "tp", "pp"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} differs: {ours} here, {theirs} there."
        return None

    def token_bytes(self) -> int:
        """Bytes of KV one token adds over all layers (a window group's share included)."""
        return sum(group.token_bytes * len(group.layers) for group in self.groups)
