"""Who holds which cache block. Pure bookkeeping: block numbers in and out, no tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter, sub

from ..core.layout import CacheGroup, CacheKind
from ..core.prefix import HASH_TOKENS, chain
from .batch import NO_BLOCK, BlockCopy
from .group_blocks import GroupBlocks

_copying = attrgetter("copying")


class BlockPool:
    """The blocks of a worker's cache: reference counts, prefix table, eviction of the least recently used, fences.

    A block of a group is exactly one of: free; cached (no reference, found by its prefix hash, evictable); referenced (in the
    tables of one or more sequences); fenced (given back, but a step in flight may still touch it).
    """

    def __init__(self, num_blocks: Sequence[int], groups: Sequence[CacheGroup], block_size: int) -> None:
        if block_size != HASH_TOKENS:
            raise ValueError(f"block_size {block_size}: prefixes are hashed per {HASH_TOKENS} tokens")
        if len(num_blocks) != len(groups):
            raise ValueError(f"{len(num_blocks)} block counts for {len(groups)} groups")
        self.groups = tuple(groups)
        self.block_size = block_size
        self.num_blocks = tuple(num_blocks)
        self.parts = tuple(GroupBlocks(count) for count in num_blocks)
        self.windows = tuple((g, group.window) for g, group in enumerate(groups) if group.window)
        self._full = tuple(g for g, group in enumerate(groups) if group.kind is CacheKind.FULL)
        self._tables: set[BlockTable] = set()
        self._submitted = self._completed = -1

    def open(self, hashes: list[bytes]) -> BlockTable:
        """An empty table for a sequence; `hashes`: its root, then its first whole blocks' (the list is extended as it grows)."""
        table = BlockTable(self, hashes)
        self._tables.add(table)
        return table

    def forget(self, table: BlockTable) -> None:
        """For `BlockTable.close` alone: the table holds nothing any more."""
        self._tables.discard(table)

    @property
    def unused(self) -> bool:
        """Whether no sequence holds a block."""
        return all(part.available + part.fenced == part.count for part in self.parts)

    def submitted(self, step: int) -> None:
        """`step` is in flight: what is given back from now on may be touched by it. The schedulers call this."""
        self._submitted = step

    def completed(self, step: int) -> None:
        """`step` and all before it have completed. The schedulers call this."""
        self._completed = step
        for part in self.parts:
            part.completed(step)

    @property
    def copying(self) -> bool:
        """Whether blocks are still to be copied: the next step does it."""
        return any(map(_copying, self.parts))

    def issue_copies(self) -> tuple[BlockCopy, ...]:
        """The copies that the step submitted last has to make before its rows."""
        return tuple(BlockCopy(g, *pair) for g, part in enumerate(self.parts) for pair in part.issue_copies(self._submitted))

    @property
    def fence(self) -> int | None:
        """The last step in flight; None if there is none."""
        return self._submitted if self._submitted > self._completed else None

    def match(self, hashes: Sequence[bytes], limit: int, position: int = 0) -> int:
        """How many tokens (whole blocks, at most `limit`) of the sequence with block hashes `hashes[1:]` are cached.

        n tokens are cached if every full group has all their blocks and every window group those that a query at
        max(n, `position`) sees: `position` is where computing will go on if KV from n up to there comes from elsewhere.
        """
        if not self.windows:
            return self._match_full(hashes, limit)
        best, runs = 0, [0] * len(self.groups)
        for index in range(min(len(hashes) - 1, limit // self.block_size)):
            for g, part in enumerate(self.parts):
                runs[g] = runs[g] + 1 if part.find(hashes[index + 1]) is not None else 0
            whole = index + 1
            if any(runs[g] < whole for g in self._full):
                break
            if all(runs[g] >= whole - self.first_block(g, max(whole * self.block_size, position)) for g in range(len(runs))):
                best = whole
        return best * self.block_size

    def _match_full(self, hashes: Sequence[bytes], limit: int) -> int:
        """As `match` where no group has a window: up to the first block that some group lacks."""
        most = min(len(hashes) - 1, limit // self.block_size)
        for index in range(most):
            for part in self.parts:
                if part.find(hashes[index + 1]) is None:
                    return index * self.block_size
        return max(0, most) * self.block_size

    def cost(self, hashes: Sequence[bytes], cached: int, tokens: int, position: int) -> tuple[int, ...]:
        """Available blocks per group that a new sequence takes: to pin its `cached` tokens and to hold positions up to `tokens`,
        where no query before `position` will come."""
        costs = []
        for g, part in enumerate(self.parts):
            first, whole = self.first_block(g, position), cached // self.block_size
            pinned = [part.find(h) for h in hashes[1 + min(first, whole) : 1 + whole]]
            new = max(0, self.blocks(tokens) - max(first, whole))
            costs.append(new + sum([block is not None and part.is_cached(block) for block in pinned]))
        return tuple(costs)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def first_block(self, g: int, position: int) -> int:
        """The first block of a table of group `g` that a query at `position` sees."""
        return self.groups[g].first_needed(position) // self.block_size

    def most_held(self, g: int, tokens: int, chunk: int) -> int:
        """The most blocks of group `g` that a sequence of `tokens`, computed at most `chunk` positions a step, holds at once."""
        whole, group = self.blocks(tokens), self.groups[g]
        if group.kind is CacheKind.FULL:
            return whole
        seen = group.window - 1 + chunk  # positions, at any offset within a block
        return min(whole, (seen - 2) // self.block_size + 2)

    def longest(self, chunk: int) -> int:
        """Tokens of the longest sequence that the empty pool holds, computed at most `chunk` positions a step."""
        bounds = (count * self.block_size for count in self.num_blocks)
        return min((bound for g, bound in enumerate(bounds) if self.most_held(g, 2**31, chunk) > self.num_blocks[g]), default=2**31)

    def available(self) -> tuple[int, ...]:
        """Blocks per group that can be taken now."""
        return tuple([part.available for part in self.parts])

    def open_next(self, tables: Sequence[BlockTable]) -> bool:
        """One more block of each group for each of these in turn, where no group has a window. False, and nothing has changed, if there are
        not as many."""
        count = len(tables)
        for part in self.parts:
            if part.available < count:
                return False
        for table, blocks in zip(tables, zip(*[part.take_several(count) for part in self.parts], strict=True), strict=True):
            table.append(blocks)
        return True

    def scarcest(self) -> tuple[int, int]:
        """`(free, total)` blocks of the group with the smallest free share; cached and fenced blocks are free."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return part.available + part.fenced, part.count
        counts = ((part.available + part.fenced, part.count) for part in self.parts)
        return min(counts, key=lambda count: count[0] / count[1])

    def by_state(self) -> dict[str, int]:
        """Blocks of all groups: free, cached, referenced, fenced."""
        free = cached = fenced = 0
        for part in self.parts:
            free, cached, fenced = free + part.free, cached + part.available - part.free, fenced + part.fenced
        return {"free": free, "cached": cached, "referenced": sum(self.num_blocks) - free - cached - fenced, "fenced": fenced}

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        for g, part in enumerate(self.parts):
            part.check(Counter(block for table in self._tables for block in table.tables[g] if block != NO_BLOCK))
            assert self.fence is not None or part.fenced == 0, "a block is fenced with no step in flight"


class BlockTable:
    """The blocks of one sequence, per group in order of position. Made by `BlockPool.open`; ends with `close`."""

    __slots__ = ("_capacity", "_more", "_passed", "_published", "_slides_at", "_tables", "hashes", "pool")

    def __init__(self, pool: BlockPool, hashes: list[bytes]) -> None:
        self.pool = pool
        self.hashes = hashes
        self._tables: tuple[tuple[int, ...], ...] = ((),) * len(pool.groups)
        self._more: list[tuple[int, ...]] = []
        """Blocks taken one by one since, of each group one: to join each to a long table costs more than to take it."""
        self._passed = [0] * len(pool.groups)
        self._published = 0
        self._refresh()

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """`tables[g][i]`: as of `batch.Row`."""
        if self._more:
            self._tables = tuple([row + more for row, more in zip(self._tables, zip(*self._more, strict=True), strict=True)])
            self._more = []
        return self._tables

    @tables.setter
    def tables(self, tables: tuple[tuple[int, ...], ...]) -> None:
        self._tables, self._more = tables, []

    def _refresh(self) -> None:
        """After every change: positions with blocks in all groups, and the first query that lets a block leave its window."""
        size, windows = self.pool.block_size, self.pool.windows
        self._capacity = min(map(len, self.tables)) * size
        self._slides_at = min([(self._passed[g] + 1) * size + window - 1 for g, window in windows]) if windows else 2**63

    def ready(self, start: int, stop: int) -> bool:
        """Whether `slide(start)` and `extend(stop, start)` have nothing to do: so it is in 7 of 8 decode steps."""
        return stop <= self._capacity and start < self._slides_at

    def adopt(self, cached: int, position: int) -> None:
        """Reference the cached blocks of the first `cached` tokens (as `match` said) that a query at `position` sees. Table empty."""
        if not cached:
            return
        whole, tables = cached // self.pool.block_size, []
        for g, part in enumerate(self.pool.parts):
            first = min(whole, self.pool.first_block(g, position))
            blocks = [part.find(prefix_hash) for prefix_hash in self.hashes[1 + first : 1 + whole]]
            row = (NO_BLOCK,) * first
            for block in blocks:
                assert block is not None, "adopt follows match"
                part.refer(block)
                row += (block,)
            self._passed[g] = first
            tables.append(row)
        self.tables, self._published = tuple(tables), whole
        self._refresh()

    def fork(self, tokens: int) -> BlockTable | None:
        """A table that goes on behind the first `tokens` tokens by itself: it shares their whole blocks, and what a last, partial one
        holds is copied by the next step; until then it is neither forked nor computed into. None, and nothing has changed, if there
        is no block for the copy."""
        whole, rest = divmod(tokens, self.pool.block_size)
        if rest and not all(self.pool.available()):
            return None
        other = self.pool.open(self.hashes[: whole + 1])
        rows = []
        for part, row in zip(self.pool.parts, self.tables, strict=True):
            shared = row[:whole]
            for block in shared:
                if block != NO_BLOCK:
                    part.refer(block)
            rows.append((*shared, part.take_copy(row[whole])) if rest else shared)
        other.tables, other._passed, other._published = tuple(rows), [min(passed, whole) for passed in self._passed], whole
        other._refresh()
        return other

    def lacks(self, tokens: int, position: int, *, full_only: bool = False) -> tuple[int, ...]:
        """New blocks per group to hold positions up to `tokens`, where no query before `position` will come."""
        target, counts = self.pool.blocks(tokens), []
        for g, row in enumerate(self.tables):
            if not self.pool.groups[g].window:
                counts.append(max(0, target - len(row)))
            else:
                counts.append(0 if full_only else max(0, target - max(len(row), self.pool.first_block(g, position))))
        return tuple(counts)

    def extend(self, tokens: int, position: int, *, full_only: bool = False) -> bool:
        """Take those blocks. False, and nothing has changed, if they are not all available."""
        if tokens <= self._capacity:
            return True
        if not self.pool.windows:
            return self._extend_full(tokens)
        lacks = self.lacks(tokens, position, full_only=full_only)
        for count, part in zip(lacks, self.pool.parts, strict=True):
            if count > part.available:
                return False
        self.tables = tuple(self._grown(g, count, position) for g, count in enumerate(lacks))
        self._refresh()
        return True

    def _extend_full(self, tokens: int) -> bool:
        """As `extend` where no group has a window: all tables are equally long."""
        pool, lack = self.pool, self.pool.blocks(tokens) - self._capacity // self.pool.block_size
        for part in pool.parts:
            if lack > part.available:
                return False
        if lack == 1:
            self.append(tuple([part.take() for part in pool.parts]))
        else:
            self.tables = tuple([row + part.take_several(lack) for row, part in zip(self.tables, pool.parts, strict=True)])
            self._capacity += lack * pool.block_size
        return True

    def append(self, blocks: tuple[int, ...]) -> None:
        """One more block of each group, taken for it."""
        self._more.append(blocks)
        self._capacity += self.pool.block_size

    def _grown(self, g: int, count: int, position: int) -> tuple[int, ...]:
        row = self.tables[g]
        if not count:
            return row
        gap = max(0, self.pool.first_block(g, position) - len(row)) if self.pool.groups[g].window else 0
        if gap:
            assert self._passed[g] == len(row), "slide to the position first"
            self._passed[g] = len(row) + gap
        return row + (NO_BLOCK,) * gap + self.pool.parts[g].take_several(count)

    def slides(self, position: int) -> bool:
        """Whether `slide(position)` may give something back."""
        return position >= self._slides_at

    def slide(self, position: int) -> None:
        """No query before `position` will come: give back what left the windows."""
        if position < self._slides_at:
            return
        for g, row in enumerate(self.tables):
            passed = self._passed[g]
            first = min(len(row), self.pool.first_block(g, position))
            if first > passed:
                self._give_back(g, row[passed:first])
                self._passed[g] = first
                self.tables = (*self.tables[:g], (NO_BLOCK,) * first + row[first:], *self.tables[g + 1 :])
        self._refresh()

    def publish(self, token_ids: Sequence[int], computed: int, lacking: Sequence[int] = ()) -> None:
        """The KV of the first `computed` tokens is stored: enter their whole blocks in the prefix table. Of the groups in `lacking` the
        first new block holds rubbish before the window, so it is not entered: a shorter prompt that found it would see that."""
        size, first, whole = self.pool.block_size, self._published, computed // self.pool.block_size
        if whole <= first:
            return
        if len(self.hashes) <= whole:
            self.hashes += chain(self.hashes[-1], token_ids[(len(self.hashes) - 1) * size : whole * size])
        for g, (part, row) in enumerate(zip(self.pool.parts, self.tables, strict=True)):
            start = max(first, self._passed[g]) + 1 if g in lacking else first
            part.publish(row[start:whole], self.hashes[start + 1 : whole + 1])
        self._published = whole

    def reaches(self, tokens: int) -> bool:
        """Whether there are blocks for the first `tokens` tokens, or were until they left a window."""
        return tokens <= self._capacity

    def alone_from(self, position: int) -> bool:
        """Whether no other table holds a block that positions from `position` on are stored in."""
        first = position // self.pool.block_size
        rows = zip(self.pool.parts, self.tables, strict=True)
        return all(part.users(block) == 1 for part, row in rows for block in row[first:] if block != NO_BLOCK)

    def held(self) -> tuple[int, ...]:
        """Blocks per group that this table references."""
        return tuple(map(sub, map(len, self.tables), self._passed))

    def close(self) -> None:
        """Give everything back, the last blocks first, so that they are evicted before the prefixes they depend on."""
        for g, row in enumerate(self.tables):
            self._give_back(g, row[self._passed[g] :][::-1])
        self.tables = ((),) * len(self.tables)
        self._passed = [0] * len(self.tables)
        self._refresh()
        self.pool.forget(self)

    def _give_back(self, g: int, blocks: Sequence[int]) -> None:
        self.pool.parts[g].give_back_several(blocks, self.pool.fence)
