"""What the source announces next, and in which pieces; in place of a piece that it does not hold, words for the Grant that asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..core.layout import Layout
from .actions import Send, Stage
from .coverage import PIECE_BYTES, ahead
from .source_state import Lane, Transfer
from .staging import slot_bytes


def to_read(layout: Layout, transfer: Transfer, word: int) -> Iterator[tuple[Transfer, Send | str]]:
    """One-sided: Ready for all that is computed and not yet announced."""
    assert transfer.announced is not None
    for span in ahead(layout, transfer.computed, transfer.announced, PIECE_BYTES):
        if (fault := transfer.lacks(span, layout)) is not None:
            yield transfer, fault
            return
        transfer.announced.extend(span.layers, span.start, span.stop)
        ready = transfer.ready(span, transfer.blocks(span, layout.block_size), transfer.slot, word)
        yield transfer, Send(transfer.lane, ready)


def to_stage(layout: Layout, lane: Lane, transfers: Mapping[str, Transfer]) -> Iterator[tuple[Transfer, Stage | str]]:
    """Two-sided: give the lane's free staging slots to what is computed, a piece to each transfer in turn. A transfer that lacks a
    piece must have been failed (and so dropped from the staging) before the next is asked for."""
    staging = lane.staging
    assert staging is not None
    while (transfer_id := staging.next()) is not None:
        transfer = transfers[transfer_id]
        assert transfer.announced is not None
        span = next(ahead(layout, transfer.computed, transfer.announced, slot_bytes(layout)), None)
        if span is None:
            staging.drop(transfer_id)
        elif (fault := transfer.lacks(span, layout)) is not None:
            yield transfer, fault
        else:
            transfer.announced.extend(span.layers, span.start, span.stop)
            blocks = transfer.blocks(span, layout.block_size)
            yield transfer, Stage(lane.number, staging.take(transfer_id, span), span, blocks)
