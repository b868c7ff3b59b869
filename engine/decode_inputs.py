"""Inputs of steps of decodes alone: a new token for each row, and all rows draw. They stay from one step to the next, and what is the same
is not written again: most rows are one position on, and their tables end as they did or have one block more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.layout import CacheGroup
from ..kernels.attend_singles import PagedSingles
from .batch import Row
from .inputs import NOTHING, GroupInputs, Inputs, paging_of

Numbers = NDArray[np.int64]


def decodes(rows: Sequence[Row]) -> bool:
    """Whether a step of these rows has inputs of this kind."""
    return all(len(row.token_ids) < 2 and row.draws for row in rows)


class DecodeInputs:
    """Room for `rows` rows whose positions are below `context`. All of it is one run of memory, `whole`, int64 [n]: a copy of that, cut in
    the same way (`cut`), is the inputs elsewhere."""

    def __init__(self, groups: Sequence[CacheGroup], *, block_size: int, rows: int, context: int, pinned: bool = False) -> None:
        self.rows, self.context = rows, context
        self._groups = groups
        self._last = max(range(len(groups)), key=lambda index: groups[index].layers[-1:])
        reach = [min(context, group.window or context) for group in groups]
        self._widths = [(each - 1) // block_size + (2 if group.window else 1) for group, each in zip(groups, reach, strict=True)]
        sizes = [size for group, width in zip(groups, self._widths, strict=True) for size in (group.kv_heads, width, 1)]
        ends = [end * rows for end in accumulate((1, 1, 1, *sizes))]
        self._bounds = list(zip((0, *ends), ends, strict=False))
        numbers = torch.zeros(ends[-1], dtype=torch.int64, pin_memory=True).numpy() if pinned else np.zeros(ends[-1], np.int64)
        self.whole = torch.from_numpy(numbers)
        token_ids, positions, drawn, *rest = [numbers[begin:end] for begin, end in self._bounds]
        drawn[:] = np.arange(rows)
        self._token_ids, self._positions = token_ids, positions
        self._parts_of = [
            _GroupNumbers(index, group, block_size, *[part.reshape(rows, -1) for part in rest[3 * index : 3 * index + 3]])
            for index, group in enumerate(groups)
            if group.layers
        ]
        self._cuts: dict[int, Inputs] = {}

    def fill(self, rows: Sequence[Row], last_drawn: Sequence[int]) -> None:
        """Be the inputs of these rows, of which there is room for each; a row without token ids takes its token from
        `last_drawn[row.slot]`."""
        starts = [row.start for row in rows]
        self._token_ids[: len(rows)] = [row.token_ids[0] if row.token_ids else last_drawn[row.slot] for row in rows]
        self._positions[: len(rows)] = starts
        for part in self._parts_of:
            part.fill(rows, starts)

    def inputs(self, rows: int) -> Inputs:
        """Of the first `rows` rows; they change with every `fill`."""
        if rows not in self._cuts:
            self._cuts[rows] = self.cut(self.whole, rows)
        return self._cuts[rows]

    def cut(self, whole: Tensor, rows: int) -> Inputs:
        """The inputs of the first `rows` rows in a copy of `whole`. Tables are wider than a row needs; what is behind that is not read."""
        token_ids, positions, drawn, *rest = self._parts(whole)
        groups = tuple(
            self._of_group(group, rest[3 * index : 3 * index + 3], drawn[:rows], positions[:rows]) if group.layers else NOTHING
            for index, group in enumerate(self._groups)
        )
        return Inputs(token_ids[:rows], positions[:rows], groups, drawn[:rows], groups[self._last].spans)

    def _of_group(self, group: CacheGroup, parts: Sequence[Tensor], drawn: Tensor, positions: Tensor) -> GroupInputs:
        store, tables, firsts = parts
        rows = drawn.shape[0]
        return GroupInputs(
            store.view(-1)[: rows * group.kv_heads], (PagedSingles(drawn, tables[:rows], firsts.view(-1)[:rows], positions),)
        )

    def _parts(self, whole: Tensor) -> list[Tensor]:
        """Token ids, positions and 0, 1, 2, … [rows] each; then of each group where is stored [rows, kv_heads], tables [rows, width], first
        positions [rows, 1]."""
        parts = [whole[begin:end] for begin, end in self._bounds]
        return [*parts[:3], *(part.view(self.rows, -1) for part in parts[3:])]


class _GroupNumbers:
    """One group's: store [rows, kv_heads], tables [rows, width], firsts [rows, 1]."""

    def __init__(self, index: int, group: CacheGroup, block_size: int, store: Numbers, tables: Numbers, firsts: Numbers) -> None:
        self._index, self._block_size = index, block_size
        self._store, self._tables, self._firsts = store, tables, firsts
        self._paging = paging_of(group, block_size)
        self._heads = np.arange(group.kv_heads)
        self._held: list[tuple[int, ...]] = [()] * len(tables)
        """What the tables begin with."""

    def fill(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        size, index, blocks = self._block_size, self._index, []
        firsts = [self._paging.first_key(start) for start in starts] if self._paging.window else [0] * len(starts)
        for place, (row, start, first) in enumerate(zip(rows, starts, firsts, strict=True)):
            run = row.tables[index][first // size : start // size + 1]
            blocks.append(run[-1])
            if run is not self._held[place]:
                self._hold(place, run)
        count = len(blocks)
        heads = np.array(blocks)[:, None] * len(self._heads) + self._heads
        self._store[:count] = heads * (2 * size) + (np.array(starts) % size)[:, None]
        if self._paging.window:
            self._firsts[:count, 0] = firsts

    def _hold(self, place: int, run: tuple[int, ...]) -> None:
        held = self._held[place]
        same = len(held) if run[: len(held)] == held else 0
        self._tables[place, same : len(run)] = run[same:]
        self._held[place] = run
