"""What is wrong with a message: neither end trusts the other with an index. Each function answers with words, or None if all is well."""

from __future__ import annotations

from ..core.layout import Layout
from ..core.transfer import GroupGrant, Hello, Ready, Refused, RefusedReason, Transport
from .coverage import Span, blocks_of
from .slices import Route


def refusal(ours: Hello, theirs: Hello) -> Refused | None:
    """Why no KV can be exchanged with the peer that said `theirs`, as a sentence naming the difference; None if it can."""
    if ours.protocol_version != theirs.protocol_version:
        message = f"protocol_version differs: {ours.protocol_version} here, {theirs.protocol_version} at {theirs.worker_id}."
        return Refused("", RefusedReason.LAYOUT, message)
    difference = ours.layout.difference(theirs.layout)
    if difference is not None:
        return Refused("", RefusedReason.LAYOUT, f"{ours.worker_id} and {theirs.worker_id} cannot exchange KV: {difference}")
    if not common_transports(ours, theirs):
        spoken = " and ".join(f"{hello.worker_id} may use {', '.join(hello.transports) or 'none'}" for hello in (ours, theirs))
        return Refused("", RefusedReason.TRANSPORT, f"{ours.worker_id} and {theirs.worker_id} have no transport in common: {spoken}.")
    return None


def answer_fault(ours: Hello, theirs: Hello) -> str | None:
    """What is wrong with a destination's answer to our Hello."""
    if (refused := refusal(ours, theirs)) is not None:
        return refused.message
    return None if len(theirs.transports) == 1 else f"{theirs.worker_id} has chosen no transport."


def common_transports(ours: Hello, theirs: Hello) -> tuple[Transport, ...]:
    """Those that both ends may use, in our order."""
    common = (transport for transport in ours.transports if transport in theirs.transports)
    mappable = len(theirs.shm) == theirs.layout.ranks
    return tuple(transport for transport in common if transport.two_sided or mappable)


def grant_fault(groups: tuple[GroupGrant, ...], prompt_tokens: int, destination: Layout) -> str | None:
    """`groups` must hold the prompt from each first position on, in blocks the destination has."""
    size = destination.block_size
    if len(groups) != len(destination.groups):
        return f"it has {len(groups)} cache groups, not {len(destination.groups)}"
    for group, count in zip(groups, destination.num_blocks, strict=True):
        first = group.first_position
        if first % size or not 0 <= first <= prompt_tokens:
            return f"position {first} does not start a block of {size} within {prompt_tokens} tokens"
        if len(group.blocks) != -(-(prompt_tokens - first) // size):
            return f"{len(group.blocks)} blocks of {size} do not hold positions {first} to {prompt_tokens}"
        if len(set(group.blocks)) != len(group.blocks) or not _within(group.blocks, count):
            return f"blocks {group.blocks} are not distinct ones of {count}"
    return None


def piece_fault(ready: Ready, routes: tuple[Route, ...]) -> str | None:
    """The piece must lie in one cache group of its route. (Order and holes are `Coverage`'s to judge.)"""
    if not 0 <= ready.route < len(routes):
        return f"there is no route {ready.route}"
    groups = routes[ready.route].groups
    if not 0 <= ready.group < len(groups) or not ready.layers or not set(ready.layers) <= set(groups[ready.group].layers):
        return f"cache group {ready.group} has no layers {ready.layers}"
    if not 0 <= ready.start < ready.stop:
        return f"{ready.start} to {ready.stop} are no positions"
    return None


def size_fault(ready: Ready, routes: tuple[Route, ...], most_bytes: int) -> str | None:
    """Why it cannot be said how many bytes to receive, or where to put them meanwhile."""
    if (fault := piece_fault(ready, routes)) is not None:
        return fault
    size = Span(ready.group, ready.layers, ready.start, ready.stop).bytes(routes[ready.route].groups)
    return f"{size} bytes are more than a staging slot holds" if size > most_bytes else None


def place_fault(ready: Ready, source: Layout, slots: int) -> str | None:
    """A piece that is to be copied from the source's pool must lie there, under one of its epoch words."""
    span = Span(ready.group, ready.layers, ready.start, ready.stop)
    if len(ready.blocks) != blocks_of(span, source.block_size):
        return f"{len(ready.blocks)} blocks do not hold positions {ready.start} to {ready.stop}"
    if not _within(ready.blocks, source.num_blocks[ready.group]):
        return "a block is outside the source's pool"
    if not 0 <= ready.slot < slots:
        return f"there is no epoch word {ready.slot}"
    return None


def _within(blocks: tuple[int, ...], count: int) -> bool:
    return not blocks or (min(blocks) >= 0 and max(blocks) < count)
