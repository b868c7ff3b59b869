"""Shared memory between two processes of one host: the destination maps the source's pool, read-only, and copies from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...core.layout import Layout
from ...core.transfer import ShmEndpoint, Transport
from ...kernels.copy_runs import Piece, copy_runs
from ..actions import Copy
from ..casting import cast_runs
from ..crossing import Crossing
from ..geometry import Geometry
from ..memory import address_of
from ..pool import Pool
from . import one_sided
from .one_sided import PeerFile


class ShmPool:
    """`one_sided.PeerPool`."""

    def __init__(self, layout: Layout, file: PeerFile) -> None:
        self.geometry = Geometry(layout)
        self.address = address_of(file.mapped)
        self.file = file

    def stored(self, asked: Sequence[Copy]) -> Callable[[], bool]:
        """A source in host memory announces what lies there."""
        return lambda: True

    def begin(self, into: Pool, asked: Sequence[tuple[Crossing, Copy]]) -> None:
        plain: list[Piece] = []
        for crossing, copy in asked:
            span = copy.span
            found = crossing.between(span, copy.source_blocks, copy.destination_blocks)
            layers = [(self.address + self.geometry.offsets[layer], into.address + into.geometry.offsets[layer]) for layer in span.layers]
            if not crossing.casts(span.group):
                plain.append((layers, found))
                continue
            reads, writes = crossing.sources[span.group], crossing.destinations[span.group]
            for here, there in layers:
                cast_runs(here, reads, there, writes, found)
        copy_runs(plain)

    def close(self) -> None:
        self.file.close()


async def attach(worker_id: str, endpoint: ShmEndpoint, layout: Layout) -> ShmPool:
    """Map a pool of `worker_id`, whose own layout is `layout`. Raises `TransferFailed` as `one_sided.attach` does."""
    return await one_sided.attach(Transport.SHM, worker_id, endpoint, lambda file: ShmPool(layout, file), Geometry(layout).size)
