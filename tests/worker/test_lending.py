"""Cores lent between the ranks of a host: an owner waits for a product at most, and a core has at most one borrower."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import ClassVar

import pytest
from diptych.core.fleet import Phase
from diptych.worker.lending import GONE_NS, WAIT_NS, CoreTable, Lending
from diptych.worker.patience import LATE_NS, MANY_ROWS, SOON_NS, Patience
from hypothesis import given, settings
from hypothesis import strategies as st

REST = SOON_NS[Phase.DECODE]
PAUSE = 50_000


class Clock:
    def __init__(self) -> None:
        self.now = 1

    def __call__(self) -> int:
        return self.now


class Rank:
    """`used`: the cores it computes on, the first its own. `meanwhile` is what others do while it waits."""

    killed: ClassVar[set[int]] = set()
    pids: ClassVar[Iterator[int]] = count(1000)

    def __init__(self, table: CoreTable, own: Sequence[int], clock: Clock) -> None:
        self.own, self.used, self.computing, self.pid = tuple(own), tuple(own), False, next(self.pids)
        self.clock, self.pauses = clock, 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.lending = Lending(
            table, own, self.pid, patience=Patience(Phase.DECODE), use=self._use, now=clock, pause=self._pause, lives=self._lives
        )

    def _use(self, cores: Sequence[int]) -> None:
        self.used = tuple(cores)

    def _pause(self) -> None:
        self.clock.now += PAUSE
        self.pauses += 1
        self.meanwhile()

    def _lives(self, pid: int) -> bool:
        return pid not in self.killed

    def begin(self, rows: int = 1) -> None:
        self.lending.busy(rows)
        self.computing = True

    def end(self) -> None:
        self.lending.idle()
        self.computing = False

    @property
    def borrowed(self) -> set[int]:
        return set(self.used) - set(self.own) if self.computing else set()


@contextmanager
def table_of(cores: int) -> Iterator[CoreTable]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, CoreTable.size(cores))
    table = CoreTable(fd, cores)
    os.close(fd)
    try:
        yield table
    finally:
        table.close()


def two_beside_one_idle(table: CoreTable, clock: Clock) -> tuple[Rank, Rank]:
    """Of cores 0 to 2 the first is to be had, and the ranks of the others compute."""
    idle, first, second = (Rank(table, (core,), clock) for core in range(3))
    idle.end()
    clock.now += REST
    first.begin()
    second.begin()
    return first, second


def lent(table: CoreTable, clock: Clock) -> tuple[Rank, Rank]:
    """The core of the first is borrowed by the second, which computes."""
    prefill, decode = Rank(table, (0,), clock), Rank(table, (1,), clock)
    prefill.end()
    clock.now += REST
    decode.begin()
    assert [decode.lending.look(), decode.lending.look()] == [1, 2]
    return prefill, decode


def test_the_core_of_an_idle_rank_is_borrowed_after_its_rest_and_given_back_when_it_computes() -> None:
    clock = Clock()
    with table_of(2) as table:
        prefill, decode = Rank(table, (0,), clock), Rank(table, (1,), clock)
        decode.begin()
        assert decode.lending.look() == 1, "nobody has said that core 0 is to be had"
        prefill.end()
        assert decode.lending.look() == 1
        clock.now += REST
        assert decode.lending.look() == 1, "asked for"
        assert decode.lending.look() == 2
        assert decode.used == (1, 0)
        prefill.begin()
        assert decode.lending.look() == 1
        assert decode.used == (1,)


def test_an_owner_waits_until_what_its_borrower_computes_there_has_ended() -> None:
    clock = Clock()
    with table_of(2) as table:
        prefill, decode = lent(table, clock)
        prefill.meanwhile = lambda: prefill.pauses == 3 and decode.lending.look()
        prefill.begin()
        assert (prefill.pauses, decode.used) == (3, (1,))
        prefill.begin()
        assert prefill.pauses == 3, "it has had its core since the step before"


def test_an_owner_waits_no_longer_than_a_product_and_not_for_one_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with table_of(2) as table:
        prefill, decode = lent(table, clock)
        prefill.begin()
        assert prefill.pauses == WAIT_NS // PAUSE, "the borrower looks at nothing"
        prefill.end()
        monkeypatch.setattr(Rank, "killed", {decode.pid})
        prefill.begin()
        assert prefill.pauses == WAIT_NS // PAUSE


def test_who_was_disturbed_borrows_a_core_late_unless_it_has_many_rows() -> None:
    clock = Clock()
    with table_of(2) as table:
        prefill, decode = lent(table, clock)
        prefill.begin()
        decode.lending.look()
        prefill.end()
        clock.now += REST
        assert [decode.lending.look(), decode.lending.look()] == [1, 1]
        decode.begin(MANY_ROWS)
        assert [decode.lending.look(), decode.lending.look()] == [1, 2], "though nobody has written anything"
        decode.begin()
        assert decode.lending.look() == 2, "what it has it keeps"
        decode.end()
        decode.begin()
        assert [decode.lending.look(), decode.lending.look()] == [1, 1]
        clock.now += LATE_NS
        assert [decode.lending.look(), decode.lending.look()] == [1, 2]


def test_an_owner_that_computes_between_answers_disturbs_nobody() -> None:
    clock = Clock()
    with table_of(2) as table:
        prefill, decode = lent(table, clock)
        for _ in range(3):
            decode.end()
            prefill.begin()
            decode.begin()
            assert decode.lending.look() == 1, "the prompt before the answer has not ended"
            prefill.end()
            assert decode.lending.look() == 1
            clock.now += REST
            assert [decode.lending.look(), decode.lending.look()] == [1, 2]


def test_who_ends_gives_back_what_it_has_borrowed() -> None:
    clock = Clock()
    with table_of(3) as table:
        first, second = two_beside_one_idle(table, clock)
        assert [first.lending.look(), second.lending.look()] == [1, 1]
        assert [first.lending.look(), second.lending.look()] == [2, 1], "it is the first one's"
        first.end()
        clock.now += REST
        assert [second.lending.look(), second.lending.look()] == [1, 3], "with the core of the first, which is idle now"


def test_what_was_borrowed_by_one_that_was_killed_is_to_be_had_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with table_of(3) as table:
        first, second = two_beside_one_idle(table, clock)
        assert [first.lending.look(), second.lending.look(), first.lending.look()] == [1, 1, 2]
        monkeypatch.setattr(Rank, "killed", {first.pid})
        clock.now += GONE_NS
        assert [second.lending.look(), second.lending.look()] == [1, 3], "asked for and had, though nobody has given it back"
        assert second.used == (2, 0, 1), "and its own core, which nobody computes on"


def test_cores_of_one_that_was_killed_while_it_computed_are_to_be_had_until_another_owns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with table_of(3) as table:  # the last core is nobody's
        prefill, decode = Rank(table, (0,), clock), Rank(table, (1,), clock)
        prefill.begin()
        decode.begin()
        assert [decode.lending.look(), decode.lending.look()] == [1, 1]
        monkeypatch.setattr(Rank, "killed", {prefill.pid})
        assert decode.lending.look() == 1, "nobody has written anything, and it is not yet time to look who lives"
        clock.now += GONE_NS
        assert [decode.lending.look(), decode.lending.look()] == [1, 2]
        assert decode.used == (1, 0)
        again = Rank(table, (0,), clock)
        assert decode.lending.look() == 1, "it starts, which is work too"
        again.end()
        clock.now += LATE_NS
        assert [decode.lending.look(), decode.lending.look()] == [1, 2]


def test_a_table_that_is_too_short_is_no_table() -> None:
    fd = os.memfd_create("test")
    with pytest.raises(ValueError, match="mmap length"):
        CoreTable(fd, 2)
    os.close(fd)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=4), events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=80)
)
def test_no_core_has_two_borrowers_and_none_is_kept_from_an_owner_that_computes(shape: list[int], events: list[tuple[int, int]]) -> None:
    clock = Clock()
    with table_of(sum(shape) + 1) as table:  # the last core is nobody's
        starts = [sum(shape[:i]) for i in range(len(shape))]
        ranks = [Rank(table, range(start, start + count), clock) for start, count in zip(starts, shape, strict=True)]
        for number, what in events:
            rank = ranks[number % len(ranks)]
            clock.now += what * REST // 2
            match what:
                case 0:
                    rank.begin()
                case 1:
                    rank.end()
                case _ if rank.computing:
                    assert rank.lending.look() == len(rank.used)
                    busy = {core for each in ranks if each.computing for core in each.own}
                    assert not rank.borrowed & busy, "what its owner wants is given back at the next look"
            borrowed = [core for each in ranks for core in each.borrowed]
            assert len(borrowed) == len(set(borrowed))
            assert sum(shape) not in borrowed
