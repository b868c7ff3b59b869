"""The shm copy thread meets a defect: that piece does not count, and everything behind it is done all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import pytest
from diptych.core.errors import TransferFailed
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.kernels.copy_runs import Piece
from diptych.kv_transfer.actions import Copy
from diptych.kv_transfer.coverage import Span
from diptych.kv_transfer.crossing import Crossing
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.slices import routes
from diptych.kv_transfer.transports import shm
from diptych.kv_transfer.transports.copy_thread import Copies
from kv_rig import SHM, rig


def test_a_copy_that_raises_fails_its_transfer_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_runs, broken = shm.copy_runs, True

    def copy(pieces: Sequence[Piece]) -> None:
        if broken:
            raise OverflowError("no such address")
        copy_runs(pieces)

    monkeypatch.setattr(shm, "copy_runs", copy)

    async def run() -> None:
        nonlocal broken
        async with rig(SHM) as (prefill, decode, address, _):
            decode.destination.expect("a")
            prefill.offer("a", address, 40)
            await prefill.compute_all("a")
            await decode.diary.wait("released", "a")
            error = decode.diary.errors["a"]
            assert isinstance(error, TransferFailed)
            assert "could not be copied: OverflowError: no such address" in error.message
            await prefill.diary.wait("released", "a")
            broken = False
            decode.destination.expect("b")
            prefill.offer("b", address, 40)
            await prefill.compute_all("b")
            await decode.diary.wait("committed", "b")
            await prefill.diary.wait("released", "b")

    asyncio.run(run())


def test_a_mapping_that_cannot_be_closed_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    close, failed = shm.ShmPool.close, []

    def refuse(pool: shm.ShmPool) -> None:
        close(pool)
        failed.append(pool)
        raise BufferError("somebody looks at it")

    monkeypatch.setattr(shm.ShmPool, "close", refuse)

    async def run() -> None:
        async with rig(SHM) as (prefill, decode, address, exchange):
            decode.destination.expect("a")
            prefill.offer("a", address, 40)
            await prefill.diary.wait("granted", "a")
            exchange.lanes[0].cut()
            await decode.diary.wait("released", "a")
            await prefill.diary.wait("released", "a")
            decode.destination.expect("b")
            prefill.offer("b", address, 40)
            await prefill.compute_all("b")
            await decode.diary.wait("committed", "b")
            assert failed
            await prefill.diary.wait("released", "b")

    asyncio.run(run())


class Slow:
    """A `PeerPool` whose first copy lasts until it is told to end, and which cannot copy piece 2."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.under_way, self.go_on = Event(), Event()
        self.file: Any = self

    def word(self, slot: int) -> int:
        return 7

    def stored(self, asked: Sequence[Copy]) -> Callable[[], bool]:
        return lambda: True

    def begin(self, into: Pool, asked: Sequence[tuple[Crossing, Copy]]) -> None:
        self.begun.append([copy.seq for _, copy in asked])
        self.under_way.set()
        assert self.go_on.wait(20)
        if 2 in self.begun[-1]:
            raise OverflowError("no such address")

    def close(self) -> None: ...


def test_what_waits_is_copied_together_and_one_that_cannot_be_spoils_no_other() -> None:
    layout = Layout("model", (CacheGroup(CacheKind.FULL, (0,), 1, 8, DType.FLOAT32),), 4, (8,))
    crossing, pool, slow = Crossing(routes(layout, layout)[0], layout, layout), Pool.allocate(layout), Slow()

    async def run() -> None:
        told: dict[int, str | None] = {}
        fenced = asyncio.Event()
        copies = Copies(pool, lambda _, seq, error: told.setdefault(seq, error), lambda _: fenced.set())
        pieces = [Copy(1, "a", seq, Span(0, (0,), seq, seq + 1), (0,), (0,), slot=0, word=7, route=0) for seq in range(4)]
        copies.copy(slow, crossing, pieces[0])
        await asyncio.to_thread(slow.under_way.wait, 20)
        for piece in pieces[1:]:
            copies.copy(slow, crossing, piece)
        slow.go_on.set()
        copies.fence("b")
        await asyncio.wait_for(fenced.wait(), 20)
        copies.close()
        assert slow.begun == [[0], [1, 2, 3], [1], [2], [3]]
        assert {seq: error and "OverflowError" in error for seq, error in told.items()} == {0: None, 1: None, 2: True, 3: None}

    try:
        asyncio.run(run())
    finally:
        pool.close()
