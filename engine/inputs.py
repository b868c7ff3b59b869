"""A batch as tensors: what the decoder needs of the rows, computed once per step and shared by all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..core.layout import CacheGroup
from ..kernels.attend_chunks import make_paged_chunks
from ..kernels.attend_singles import fits, make_paged_singles
from ..kernels.kv_store import store_rows
from ..kernels.paged_attention import Span, make_chunk, make_singles
from ..kernels.paging import Paging
from ..kernels.triton_kernels import attends
from .batch import Row

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """What one cache group's layers need. store: rows of the cache the new keys go to. spans: what is attended."""

    store: Tensor
    spans: tuple[Span, ...]


NOTHING = GroupInputs(store=torch.empty(0, dtype=torch.int64), spans=())
"""For a group none of whose layers are in this rank's stage."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """One step. token_ids, positions: int64 [tokens]. drawn: int64 [drawing rows], the tokens whose logits are wanted.

    last_spans: what the drawn tokens attend to in the last layer, where no other token's output is read; they are numbered from 0.
    """

    token_ids: Tensor
    positions: Tensor
    groups: tuple[GroupInputs, ...]
    drawn: Tensor
    last_spans: tuple[Span, ...]


def make_inputs(
    rows: Sequence[Row],
    last_drawn: Sequence[int],
    groups: Sequence[CacheGroup],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> Inputs:
    """Inputs of `rows`, in this host's memory, for a decoder on `device` (`placing.Upload` takes them there); a row without token ids
    takes its token from `last_drawn[row.slot]`."""
    kind = _Kind(block_size, dtype, device)
    places = [0]
    token_ids: list[int] = []
    for row in rows:
        token_ids.extend(row.token_ids or (last_drawn[row.slot],))
        places.append(len(token_ids))
    positions = np.concatenate([np.arange(row.start, row.start + row.length) for row in rows])
    inputs = tuple(_group_inputs(rows, places, index, group, kind) if group.layers else NOTHING for index, group in enumerate(groups))
    drawn = [end - 1 for row, end in zip(rows, places[1:], strict=True) if row.draws]
    last = max(range(len(groups)), key=lambda index: groups[index].layers[-1:])
    return Inputs(
        token_ids=torch.tensor(token_ids),
        positions=torch.from_numpy(positions),
        groups=inputs,
        drawn=torch.tensor(drawn, dtype=torch.int64),
        last_spans=inputs[last].spans if len(drawn) == len(token_ids) else _ends(rows, last, groups[last], kind),
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a cache is."""

    block_size: int
    dtype: torch.dtype
    device: torch.device


def _ends(rows: Sequence[Row], index: int, group: CacheGroup, kind: _Kind) -> tuple[Span, ...]:
    """The last token of each row that draws."""
    ends = [replace(row, start=row.start + row.length - 1, token_ids=()) for row in rows if row.draws]
    return tuple(_singles(ends, range(len(ends)), index, group, kind))


def paging_of(group: CacheGroup, block_size: int) -> Paging:
    """What a query of a group sees."""
    return Paging(kv_heads=group.kv_heads, block_size=block_size, window=group.window)


def _group_inputs(rows: Sequence[Row], places: Sequence[int], index: int, group: CacheGroup, kind: _Kind) -> GroupInputs:
    blocks, offsets, block_size = [], [], kind.block_size
    for row in rows:
        first, last = row.start // block_size, (row.start + row.length - 1) // block_size
        held = np.repeat(np.asarray(row.tables[index][first : last + 1], dtype=np.int64), block_size)
        begin = row.start - first * block_size
        blocks.append(held[begin : begin + row.length])
        offsets.append(np.arange(row.start, row.start + row.length) % block_size)
    store = store_rows(
        torch.from_numpy(np.concatenate(blocks)),
        torch.from_numpy(np.concatenate(offsets)),
        kv_heads=group.kv_heads,
        block_size=block_size,
    )
    return GroupInputs(store, (*_chunks(rows, places, index, group, kind), *_singles(rows, places, index, group, kind)))


def _chunks(rows: Sequence[Row], places: Sequence[int], index: int, group: CacheGroup, kind: _Kind) -> Iterator[Span]:
    """The rows with several tokens, the first of each at its place, over their tables of group `index`."""
    paging = paging_of(group, kind.block_size)
    long = [(place, row.start, row.length, row.tables[index]) for place, row in zip(places, rows, strict=False) if row.length > 1]
    if long and _paged(group, kind):
        yield make_paged_chunks(long, paging)
    else:
        yield from (make_chunk(*each, paging) for each in long)


def _singles(rows: Sequence[Row], places: Sequence[int], index: int, group: CacheGroup, kind: _Kind) -> Iterator[Span]:
    """The rows with one token, each at its place, over their tables of group `index`."""
    paging = paging_of(group, kind.block_size)
    paged = _paged(group, kind)
    for members in _together(rows) if paged else _alike(rows, paging.window):
        picked = [rows[row] for row in members]
        tokens, starts, tables = [places[row] for row in members], [row.start for row in picked], [row.tables[index] for row in picked]
        yield make_paged_singles(tokens, starts, tables, paging) if paged else make_singles(tokens, starts, tables, paging, kind.dtype)


def _paged(group: CacheGroup, kind: _Kind) -> bool:
    """Whether there are kernels that read the cache where it lies."""
    return fits(kind.dtype, group.head_dim, kind.device) or attends(kind.dtype, group.head_dim, kind.block_size, kind.device)


def _together(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows with one token, in order, at once: none is padded."""
    single = [index for index, row in enumerate(rows) if row.length == 1]
    return [single] if single else []


def _alike(rows: Sequence[Row], window: int) -> list[list[int]]:
    """Indices of the rows with one token, gathered by how much they attend to.

    A row joins the longest only if it attends to at least half as much, so padding less than doubles the reading.
    """
    reach = {index: min(row.start + 1, window or row.start + 1) for index, row in enumerate(rows) if row.length == 1}
    alike: list[list[int]] = []
    longest = 0
    for index in sorted(reach, key=lambda index: -reach[index]):
        if reach[index] * 2 < longest or not alike:
            longest = reach[index]
            alike.append([])
        alike[-1].append(index)
    return alike
