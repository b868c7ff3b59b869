"""The block pool against a slow twin that counts everything anew, and its rules one by one."""

from __future__ import annotations

import pytest
from diptych.core.prefix import chain, root_hash
from diptych.engine.batch import NO_BLOCK, BlockCopy
from diptych.engine.block_pool import BlockPool, BlockTable
from diptych.engine.slots import Slots
from fake_engine import BLOCK, groups
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

ROOT = root_hash(fingerprint="f", dtype="float32")


def tokens(length: int, family: int = 1) -> list[int]:
    return [(family * 7 + i * i) % 40 for i in range(length)]


def hashes_of(token_ids: list[int]) -> list[bytes]:
    return [ROOT, *chain(ROOT, token_ids)]


def pool_of(*windows: int, blocks: int = 8) -> BlockPool:
    return BlockPool((blocks,) * len(windows), groups(*windows), BLOCK)


def compute(pool: BlockPool, token_ids: list[int]) -> BlockTable:
    """A sequence computed whole, reusing what is cached."""
    hashes = hashes_of(token_ids)
    table = pool.open(hashes)
    cached = pool.match(hashes, len(token_ids) - 1)
    table.adopt(cached, cached)
    assert table.extend(len(token_ids), cached)
    table.publish(token_ids, len(token_ids))
    return table


def test_full_blocks_are_shared_and_partial_ones_are_not() -> None:
    pool = pool_of(0)
    first, second = compute(pool, tokens(40)), compute(pool, tokens(40))
    assert first.tables[0][:2] == second.tables[0][:2]
    assert first.tables[0][2] != second.tables[0][2]
    first.close()
    pool.check()
    second.close()
    pool.check()
    assert pool.unused


def test_an_unreferenced_block_stays_cached_until_memory_is_needed() -> None:
    pool = pool_of(0, blocks=4)
    compute(pool, tokens(48)).close()
    assert pool.match(hashes_of(tokens(48)), 48) == 48
    other = compute(pool, tokens(32, 2))
    assert pool.match(hashes_of(tokens(48)), 48) == 32, "the end of a prefix is evicted before its beginning"
    other.close()
    pool.check()


def test_the_least_recently_used_is_evicted() -> None:
    pool = pool_of(0, blocks=4)
    for family in (1, 2, 3, 4, 1):
        compute(pool, tokens(17, family)).close()
    other = compute(pool, tokens(48, 9))
    assert [pool.match(hashes_of(tokens(16, family)), 16) for family in (1, 2, 3, 4)] == [16, 0, 0, 0]
    other.close()
    pool.check()


@pytest.mark.parametrize(("lacking", "found"), [((), 96), ((1,), 0)])
def test_a_block_that_came_without_its_beginning_is_found_by_nobody(lacking: tuple[int, ...], found: int) -> None:
    """Granted from the window on, by a source whose blocks are shorter; what follows it is found, once the window has left that block."""
    pool, ids = pool_of(0, 20), tokens(128)
    table = pool.open(hashes_of(ids[:96]))
    assert table.extend(96, 96)
    table.publish(ids, 96, lacking)
    assert pool.match(hashes_of(ids), 96) == found
    assert table.extend(128, 96)
    table.publish(ids, 128)
    assert pool.match(hashes_of(ids), 128) == 128
    table.close()
    assert pool.match(hashes_of(ids), 96) == found
    pool.check()


def test_a_window_group_needs_only_its_window_for_a_hit() -> None:
    pool = pool_of(0, 20)
    table = compute(pool, tokens(96))
    table.slide(96)
    assert table.tables[1][:4] == (NO_BLOCK,) * 4
    assert table.held() == (6, 2)
    other = pool.open(hashes_of(tokens(112, 2)))
    assert not other.extend(112, 0), "all or nothing"
    assert other.held() == (0, 0)
    other.close()
    table.close()
    pool.check()
    assert pool.match(hashes_of(tokens(96)), 96) == 96


def test_a_hit_ends_where_a_window_is_lost() -> None:
    pool = pool_of(0, 20, blocks=6)
    compute(pool, tokens(96)).slide(96)
    assert pool.match(hashes_of(tokens(96)), 95) == 80
    for _ in range(4):
        pool.parts[1].take()
    assert pool.match(hashes_of(tokens(96)), 95) == 0
    assert pool.match(hashes_of(tokens(96)), 96) == 96, "what the last query sees is there"


def test_a_transfer_needs_less_of_a_window_for_a_hit() -> None:
    pool = pool_of(0, 20)
    compute(pool, tokens(32)).close()
    for _ in range(8):
        pool.parts[1].take()
    assert pool.match(hashes_of(tokens(128)), 127) == 0
    assert pool.match(hashes_of(tokens(128)), 128, 128) == 32, "the window of position 128 comes with the transfer"


def test_a_fork_shares_whole_blocks_and_copies_the_last_with_the_next_step() -> None:
    pool = pool_of(0, 20)
    table = compute(pool, tokens(40))
    other = table.fork(40)
    assert other is not None
    assert [row[:2] for row in other.tables] == [row[:2] for row in table.tables]
    pairs = [(row[2], own[2]) for row, own in zip(table.tables, other.tables, strict=True)]
    table.close()
    assert pool.available() == (4, 4), "the source of a copy is held until a step makes it"
    pool.submitted(0)
    assert pool.issue_copies() == tuple(BlockCopy(g, *pair) for g, pair in enumerate(pairs))
    assert pool.issue_copies() == ()
    assert pool.available() == (4, 4)
    pool.completed(0)
    assert pool.available() == (5, 5)
    other.close()
    pool.check()
    assert pool.unused


def test_a_copy_nobody_needs_any_more_is_not_made() -> None:
    pool = pool_of(0)
    table = compute(pool, tokens(40))
    other = table.fork(40)
    assert other is not None
    other.close()
    assert not pool.copying
    table.close()
    assert pool.unused
    pool.check()


def test_a_fork_without_a_block_for_its_copy_changes_nothing() -> None:
    pool = pool_of(0, blocks=3)
    table = compute(pool, tokens(40))
    assert table.fork(40) is None
    pool.check()
    other = table.fork(32)
    assert other is not None
    assert other.tables == (table.tables[0][:2],)
    for each in (table, other):
        each.close()
    pool.check()


def test_a_block_given_back_waits_for_the_step_in_flight() -> None:
    pool = pool_of(0, blocks=4)
    table = compute(pool, tokens(64))
    pool.submitted(0)
    pool.submitted(1)
    table.close()
    assert pool.available() == (0,)
    pool.completed(0)
    assert pool.available() == (0,)
    again = pool.open(hashes_of(tokens(32)))
    again.adopt(32, 32)  # cached blocks may be read while they are fenced
    pool.completed(1)
    assert pool.available() == (2,)
    again.close()
    pool.check()


@pytest.mark.parametrize("windows", [(0,), (1,), (0, 2), (0, 15, 16, 17), (0, 40)])
@given(length=st.integers(1, 200), chunk=st.integers(16, 64))
@settings(max_examples=40, deadline=None)
def test_most_held_bounds_what_a_prompt_holds(windows: tuple[int, ...], length: int, chunk: int) -> None:
    pool = pool_of(*windows, blocks=20)
    table = pool.open([ROOT])
    start = 0
    while start < length:
        stop = min(length, start + chunk)
        table.slide(start)
        assert table.extend(stop, start)
        for g, held in enumerate(table.held()):
            assert held <= pool.most_held(g, length, chunk) <= -(-length // BLOCK)
        start = stop
    table.close()
    pool.check()


def test_the_longest_sequence_is_bounded_by_full_groups_and_narrow_pools() -> None:
    assert pool_of(0, 20, blocks=8).longest(32) == 128
    assert pool_of(20, blocks=8).longest(32) > 10_000
    assert pool_of(20, blocks=3).longest(32) == 48


def test_a_slot_is_not_taken_again_before_its_last_step_has_completed() -> None:
    slots = Slots(1)
    slot = slots.take()
    assert slot == 0
    assert slots.take() is None
    slots.give_back(slot, 4)
    slots.completed(3)
    assert slots.take() is None
    slots.completed(4)
    assert slots.take() == 0
    slots.check({0})


class Twin:
    """The pool's contents from first principles: what each place holds, nothing else."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.prefix_in: dict[tuple[int, int], tuple[int, ...]] = {}
        """(group, block) -> all tokens up to the block's end, once published."""

    def cached(self, token_ids: list[int], limit: int, position: int) -> int:
        """The longest cached prefix, by trying every length."""
        known = set()
        for (g, _), prefix in self.prefix_in.items():
            known.add((g, prefix))
        for whole in range(min(limit, len(token_ids)) // BLOCK, 0, -1):
            needed = [
                (g, tuple(token_ids[: (i + 1) * BLOCK]))
                for g, group in enumerate(self.pool.groups)
                for i in range(group.first_needed(max(whole * BLOCK, position)) // BLOCK, whole)
            ]
            if known.issuperset(needed):
                return whole * BLOCK
        return 0


class Blocks(RuleBasedStateMachine):
    """Sequences that come, grow, slide, publish and go, with steps in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(0, 24, blocks=9)
        self.twin = Twin(self.pool)
        self.open: list[tuple[BlockTable, list[int], int]] = []
        self.in_flight: list[tuple[int, set[tuple[int, int]]]] = []
        self.copies: set[tuple[int, int, int]] = set()
        """(group, source, destination), until a step makes them or nobody holds the destination any more."""
        self.step = 0

    def _touched(self) -> set[tuple[int, int]]:
        held = {(g, block) for table, _, _ in self.open for g, row in enumerate(table.tables) for block in row if block != NO_BLOCK}
        return held | {(g, source) for g, source, _ in self.copies}

    def _to_be_copied(self, table: BlockTable) -> bool:
        return any(destination in table.tables[g] for g, _, destination in self.copies)

    def _took(self, before: set[tuple[int, int]], table: BlockTable, old: tuple[tuple[int, ...], ...]) -> None:
        """New blocks were neither referenced nor in reach of a step in flight; what they held is gone."""
        for g, row in enumerate(table.tables):
            for block in row[len(old[g]) :]:
                if block != NO_BLOCK:
                    assert (g, block) not in before
                    assert all((g, block) not in touched for _, touched in self.in_flight)
                    self.twin.prefix_in.pop((g, block), None)

    @rule(family=st.integers(1, 2), length=st.integers(1, 130), data=st.data())
    def begin(self, family: int, length: int, data: st.DataObject) -> None:
        token_ids = tokens(length, family)
        hashes = hashes_of(token_ids)
        limit = data.draw(st.integers(0, length))
        cached = self.pool.match(hashes, limit)
        assert cached == self.twin.cached(token_ids, limit, 0)
        cost, available = self.pool.cost(hashes, cached, length, cached), self.pool.available()
        table = self.pool.open(hashes)
        table.adopt(cached, cached)
        for g, row in enumerate(table.tables):
            for i, block in enumerate(row):
                assert block == NO_BLOCK or self.twin.prefix_in[g, block] == tuple(token_ids[: (i + 1) * BLOCK])
        before, old = self._touched(), table.tables
        fits = all(c <= a for c, a in zip(cost, available, strict=True))
        assert table.extend(length, cached) == fits
        if fits:
            assert self.pool.available() == tuple(a - c for c, a in zip(cost, available, strict=True))
            self._took(before, table, old)
            self.open.append((table, token_ids, cached))
        else:
            table.close()

    @rule(family=st.integers(1, 2), length=st.integers(1, 130))
    def compare_grant(self, family: int, length: int) -> None:
        token_ids = tokens(length, family)
        assert self.pool.match(hashes_of(token_ids), length, length) == self.twin.cached(token_ids, length, length)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """Compute a stretch: slide, extend, publish."""
        index = data.draw(st.integers(0, len(self.open) - 1))
        table, token_ids, done = self.open[index]
        if self._to_be_copied(table):  # what it computes comes behind the copy
            return
        stop = min(len(token_ids) + 8, done + data.draw(st.integers(1, 40)))
        token_ids = token_ids + [3] * max(0, stop - len(token_ids))
        table.slide(done)
        before, old = self._touched(), table.tables
        if not table.extend(stop, done):
            assert table.tables == old
            return
        self._took(before, table, old)
        published = {h for part in self.pool.parts for h in part._by_hash}
        table.publish(token_ids, stop)
        for g, row in enumerate(table.tables):
            for i in range(stop // BLOCK):
                if row[i] != NO_BLOCK and self.pool.parts[g].find(table.hashes[i + 1]) == row[i]:
                    self.twin.prefix_in[g, row[i]] = tuple(token_ids[: (i + 1) * BLOCK])
        assert published <= {h for part in self.pool.parts for h in part._by_hash}
        self.open[index] = (table, token_ids, stop)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, token_ids, done = data.draw(st.sampled_from(self.open))
        if self._to_be_copied(table):
            return
        whole, rest = divmod(done, BLOCK)
        before, available = self._touched(), self.pool.available()
        other = table.fork(done)
        assert (other is None) == (rest > 0 and 0 in available)
        if other is None:
            assert self.pool.available() == available
            return
        assert [row[:whole] for row in other.tables] == [row[:whole] for row in table.tables]
        assert {len(row) for row in other.tables} == {whole + (rest > 0)}
        self._took(before, other, tuple(row[:whole] for row in other.tables))
        if rest:
            rows = zip(table.tables, other.tables, strict=True)
            self.copies |= {(g, row[whole], own[whole]) for g, (row, own) in enumerate(rows)}
        assert other.alone_from(done)
        self.open.append((other, token_ids[:done], done))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        held = {(g, block) for other, _, _ in self.open for g, row in enumerate(other.tables) for block in row}
        table.close()
        self.copies = {copy for copy in self.copies if (copy[0], copy[2]) in held}
        assert table.held() == (0, 0)

    @rule()
    def submit(self) -> None:
        self.pool.submitted(self.step)
        self.in_flight.append((self.step, self._touched()))
        assert self.pool.copying == bool(self.copies)
        issued = self.pool.issue_copies()
        assert {(copy.group, copy.source, copy.destination) for copy in issued} == self.copies
        self.copies = set()
        self.step += 1

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete(self) -> None:
        self.pool.completed(self.in_flight.pop(0)[0])

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        for (g, block), prefix in self.twin.prefix_in.items():
            assert self.pool.parts[g].find(chain(ROOT, list(prefix))[-1]) == block

    def teardown(self) -> None:
        for table, _, _ in self.open:
            table.close()
        self.pool.completed(self.step)
        self.pool.check()
        assert self.pool.unused
        assert self.pool.available() == self.pool.num_blocks


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_what_is_used_again_and_again_is_not_remembered_each_time() -> None:
    pool, ids = pool_of(0, 8), tokens(64)
    for _ in range(100):
        table = pool.open(hashes_of(ids))
        table.adopt(pool.match(table.hashes, 64), 0)
        assert table.extend(64, 0)
        table.publish(ids, 64)
        table.close()
        pool.check()
    assert len(pool.parts[0]._unused) <= 3 * 8
