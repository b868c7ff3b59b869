"""The bytes of a worker's KV pool: one memfd that a peer on the same host can map."""

from __future__ import annotations

from torch import Tensor

from ..core.layout import Layout
from ..core.transfer import ShmEndpoint


class Pool:
    """`caches[g][i]` is `[num_blocks[g], kv_heads, 2, block_size, head_dim]` of layer `layout.groups[g].layers[i]`."""

    layout: Layout
    caches: list[list[Tensor]]
    endpoint: ShmEndpoint

    @classmethod
    def allocate(cls, layout: Layout) -> Pool:
        """A pool of zeros; its pages are taken when first written. Raises `ConfigError` if the host has not enough memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the memory back; no tensor of `caches` may be used any more."""
        raise NotImplementedError
