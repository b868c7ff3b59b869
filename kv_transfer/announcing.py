"""What the source announces next, and in which pieces; in place of a piece that it does not hold, words for the Grant that asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..core.layout import Layout
from .actions import Send, Stage
from .coverage import PIECE_BYTES, ahead
from .source_state import Lane, Transfer
from .staging import slot_bytes


def to_read(layout: Layout, lane: Lane, transfer: Transfer, word: int) -> Iterator[tuple[Transfer, Send | str]]:
    """One-sided: Ready for all that is computed and not yet announced."""
    for number, route in enumerate(lane.routes):
        announced = transfer.announced[number]
        for span in ahead(route.groups, layout.block_size, transfer.computed[route.source], announced, PIECE_BYTES):
            if (fault := transfer.lacks(span, layout)) is not None:
                yield transfer, fault
                return
            announced.extend(span.layers, span.start, span.stop)
            ready = transfer.ready(number, span, transfer.blocks(span, layout.block_size), transfer.slot, word)
            yield transfer, Send(transfer.lane, ready)


def to_stage(
    layout: Layout, lane: Lane, transfers: Mapping[str, Transfer], words: Sequence[int]
) -> Iterator[tuple[Transfer, Send | Stage | str]]:
    """Two-sided: Ready for what is computed, as far as each route has credits, a piece of each transfer in turn; and have it sent. A
    transfer that lacks a piece must have been failed (and so dropped from the stagings) before the next is asked for."""
    most = slot_bytes(layout)
    for number, (route, staging) in enumerate(zip(lane.routes, lane.stagings, strict=True)):
        while (transfer_id := staging.next()) is not None:
            transfer = transfers[transfer_id]
            computed, announced = transfer.computed[route.source], transfer.announced[number]
            span = next(ahead(route.groups, layout.block_size, computed, announced, most), None)
            if span is None:
                staging.drop(transfer_id)
            elif (fault := transfer.lacks(span, layout)) is not None:
                yield transfer, fault
            else:
                announced.extend(span.layers, span.start, span.stop)
                staging.take(transfer_id)
                blocks, word = transfer.blocks(span, layout.block_size), words[transfer.slot]
                ready = transfer.ready(number, span)
                yield transfer, Send(lane.number, ready)
                yield transfer, Stage(lane.number, transfer_id, ready.seq, span, blocks, transfer.slot, word, number)
