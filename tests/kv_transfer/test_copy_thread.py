"""The shm copy thread meets a defect: that piece does not count, and everything behind it is done all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from diptych.core.errors import TransferFailed
from diptych.kv_transfer.geometry import Table
from diptych.kv_transfer.transports import shm
from kv_rig import SHM, rig


def test_a_copy_that_raises_fails_its_transfer_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_runs, broken = shm.copy_runs, True

    def copy(layers: Sequence[tuple[int, int]], runs: Table) -> None:
        if broken:
            raise OverflowError("no such address")
        copy_runs(layers, runs)

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
