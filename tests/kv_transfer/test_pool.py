"""The pool's memory: what the owner may do with it, what a peer may, and who is given it."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import queue
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diptych.core.errors import ConfigError, TransferFailed
from diptych.core.layout import Layout
from diptych.core.transfer import ShmEndpoint
from diptych.kv_transfer import host_memory
from diptych.kv_transfer.door import Door
from diptych.kv_transfer.geometry import SLOTS
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.transports.shm import ShmPool, attach
from kv_rig import LAYOUT, layout_with, left_behind


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool.allocate(layout_with(8))
    yield made
    made.close()
    made.close()
    del made
    assert left_behind() == []


async def attached(pool: Pool, endpoint: ShmEndpoint | None = None, layout: Layout | None = None) -> ShmPool:
    loop = asyncio.get_running_loop()
    loop.add_reader(pool.listener, pool.hand_out)
    try:
        return await attach("P", endpoint or pool.endpoint, layout or pool.layout)
    finally:
        loop.remove_reader(pool.listener)


def test_caches_are_zeros_of_the_layouts_shape(pool: Pool) -> None:
    for group, caches in zip(LAYOUT.groups, pool.caches, strict=True):
        assert len(caches) == len(group.layers)
        for cache in caches:
            assert cache.shape == (8, group.kv_heads, 2, 16, group.head_dim)
            assert str(cache.dtype) == f"torch.{group.dtype.value}"
            assert cache.is_contiguous()
            assert not cache.any()


def test_a_peer_reads_what_the_owner_writes_and_cannot_write(pool: Pool) -> None:
    peer = asyncio.run(attached(pool))
    pool.caches[1][2].fill_(3)
    pool.set_word(7, 2**63 + 5)
    assert peer.file.word(7) == 2**63 + 5
    assert peer.file.word(8) == 0
    assert peer.file.word(SLOTS - 1) == 0
    offset = peer.geometry.offsets[LAYOUT.groups[1].layers[2]]
    with mmap.mmap(pool.memory.shared.fd, pool.geometry.size, prot=mmap.PROT_READ) as again:
        assert again[offset : offset + 2] == torch.tensor([3], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with pytest.raises(PermissionError):
        mmap.mmap(pool.memory.shared.fd, pool.geometry.size)
    with pytest.raises(PermissionError):
        os.pwrite(pool.memory.shared.fd, b"x", 0)
    peer.close()


def test_the_memory_can_neither_shrink_nor_grow(pool: Pool) -> None:
    for size in (0, pool.geometry.size * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.memory.shared.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(pool.memory.shared.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_nothing_of_it_has_a_name_in_a_directory(pool: Pool) -> None:
    assert os.readlink(f"/proc/self/fd/{pool.memory.shared.fd}") == "/memfd:diptych-kv (deleted)"
    assert pool.listener.getsockname().startswith(b"\0")


def wrong_nonce(endpoint: ShmEndpoint) -> ShmEndpoint:
    return replace(endpoint, nonce=b"x" * 16)


def wrong_socket(endpoint: ShmEndpoint) -> ShmEndpoint:
    return replace(endpoint, socket="nobody")


@pytest.mark.parametrize(("change", "why"), [(wrong_nonce, "hands out nothing"), (wrong_socket, "refused")])
def test_another_host_is_told_apart(pool: Pool, change: Callable[[ShmEndpoint], ShmEndpoint], why: str) -> None:
    with pytest.raises(TransferFailed, match=why) as caught:
        asyncio.run(attached(pool, change(pool.endpoint)))
    assert "P cannot be reached by shared memory from here" in caught.value.message


def test_a_file_without_the_nonce_is_not_mapped(pool: Pool) -> None:
    """Somebody else's, under the pool's name: as on another host whose loopback and sockets look alike."""

    async def run() -> None:
        other = Door(pool.memory.shared.fd, b"x" * 16)
        asyncio.get_running_loop().add_reader(other.listener, other.answer)
        with pytest.raises(TransferFailed, match="the nonce there is another's"):
            await attach("P", ShmEndpoint(other.name, b"x" * 16), pool.layout)
        asyncio.get_running_loop().remove_reader(other.listener)
        other.close()

    asyncio.run(run())


def test_a_pool_of_another_size_is_not_mapped(pool: Pool) -> None:
    with pytest.raises(TransferFailed, match="no pool of its layout"):
        asyncio.run(attached(pool, layout=layout_with(9)))


def test_a_listener_that_hands_out_nothing(pool: Pool) -> None:
    """As for a process of another user: the connection is closed without a file descriptor."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(pool.listener, lambda: pool.listener.accept()[0].close())
        with pytest.raises(TransferFailed, match="another user"):
            await attach("P", pool.endpoint, pool.layout)
        loop.remove_reader(pool.listener)

    asyncio.run(run())


def test_one_who_asks_and_goes_away_does_no_harm(pool: Pool) -> None:
    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + pool.endpoint.socket)
        pool.hand_out()
        pool.hand_out()
        (await attached(pool)).close()

    asyncio.run(run())


def test_too_large_a_pool_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="lower kv_tokens") as caught:
        Pool.allocate(layout_with(1 << 40))
    assert caught.value.field == "kv_tokens"


def test_tensors_outlive_the_pool() -> None:
    pool = Pool.allocate(layout_with(8))
    cache = pool.caches[0][0]
    pool.close()
    cache.fill_(1)
    assert cache.sum() == cache.numel()
    del cache
    assert left_behind() == []


def test_pages_are_there_before_they_are_used_unless_all_cores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, crowded = queue.Queue[None](), [True]

    def look() -> bool:
        looked.put(None)
        return crowded[0]

    monkeypatch.setattr(host_memory, "_crowded", look)
    pool = Pool.allocate(layout_with(2048))
    for _ in range(3):
        looked.get(timeout=20)
    assert taken(pool) < pool.geometry.size
    crowded[0] = False
    pool.memory._pages.join(20)
    assert taken(pool) >= pool.geometry.size
    pool.close()


def test_a_pool_whose_pages_wait_for_a_core_is_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CROWDED_S", 1e6)
    monkeypatch.setattr(host_memory, "_crowded", lambda: True)
    Pool.allocate(layout_with(8)).close()


def test_a_crowd_is_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for running, crowd in (("2", False), ("3", True)):
        (tmp_path / "loadavg").write_text(f"0.00 0.01 0.05 {running}/179 30879\n")
        assert host_memory._crowded() is crowd


def taken(pool: Pool) -> int:
    """Bytes of its pages that are there."""
    return os.fstat(pool.memory.shared.fd).st_blocks * 512
