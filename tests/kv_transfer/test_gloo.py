"""What only gloo has: checksums, staging slots, pairs that come and go, the choice between it and shm."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diptych.core.errors import TransferFailed
from diptych.core.transfer import Rendezvous
from diptych.kv_transfer import packing, slots
from diptych.kv_transfer.coverage import Span
from diptych.kv_transfer.crossing import Crossing
from diptych.kv_transfer.geometry import SLOTS
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.slices import routes
from diptych.kv_transfer.staging import CREDITS, Staging
from diptych.kv_transfer.transports import gloo
from diptych.kv_transfer.transports.two_sided import Outgoing
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_rig import (
    BLOCK,
    GLOO,
    LAYERS,
    LAYOUT,
    SHM,
    TOKENS,
    DecodeEnd,
    PrefillEnd,
    eventually,
    expected_rows,
    layout_with,
    rig,
    write,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


async def hand_over(prefill: PrefillEnd, decode: DecodeEnd, address: str, transfer_id: str, tokens: int, *, at_once: bool = False) -> None:
    decode.destination.expect(transfer_id)
    prefill.offer(transfer_id, address, tokens)
    if at_once:
        prefill.compute(transfer_id, LAYERS, 0, tokens)
        prefill.source.commit(transfer_id, TOKENS)
    else:
        await prefill.compute_all(transfer_id)
    await prefill.diary.wait("released", transfer_id)


def test_a_corrupted_piece_is_refused_and_the_next_transfer_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit changes between the two ends."""
    pieces = 0

    def corrupt(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: torch.Tensor) -> int:
        nonlocal pieces
        found = packing.pack(pool, crossing, span, blocks, slot)
        pieces += 1
        if pieces == 2:
            slot[crossing.bytes(span) // 2] ^= 4
        return found

    monkeypatch.setattr(slots, "pack", corrupt)

    async def run() -> None:
        async with rig(GLOO) as (prefill, decode, address, exchange):
            await hand_over(prefill, decode, address, "a", 150)
            assert pieces >= 2
            for end in (prefill, decode):
                assert end.diary.of("a")[-2:] == ["failed", "released"]
                assert isinstance(end.diary.errors["a"], TransferFailed)
                assert "checksum of piece 1" in end.diary.errors["a"].message
            await hand_over(prefill, decode, address, "b", 150)
            assert decode.diary.of("b") == ["offered", "committed"]
            assert len(exchange.lanes) == 1, "a wrong piece is no reason to make a new pair"

    asyncio.run(run())


def descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.timeout(300)
def test_thousands_of_small_transfers_leave_nothing_behind() -> None:
    async def run() -> None:
        async with rig(GLOO, source_blocks=64, destination_blocks=64) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "warm", 20)
            before = descriptors_and_threads()
            for first in range(0, 2000, 20):
                await asyncio.gather(
                    *(hand_over(prefill, decode, address, f"t{first + index}", 5 + index, at_once=True) for index in range(20))
                )
                decode.diary.lines.clear()
                prefill.diary.lines.clear()
            files, threads = descriptors_and_threads()
            assert files <= before[0]
            assert threads <= before[1], "an earlier test's may have ended meanwhile"
            assert len(decode.bytes) == 2001

    asyncio.run(run())


def test_pairs_come_and_go_without_a_trace() -> None:
    async def run() -> None:
        async with rig(GLOO) as (prefill, decode, address, exchange):
            await hand_over(prefill, decode, address, "first", 20)
            before = 0, 0
            for number in range(12):
                exchange.lanes[-1].cut()
                await eventually(lambda: not prefill.source._lanes)
                await hand_over(prefill, decode, address, f"t{number}", 20)
                assert decode.diary.of(f"t{number}") == ["offered", "committed"]
                await eventually(lambda: sum(t.name == "diptych-pair-post" for t in threading.enumerate()) == 2)
                if number == 4:
                    gc.collect()
                    before = descriptors_and_threads()
            gc.collect()
            # Fewer than one for each of the 7 pairs since: an executor may have started another thread for good.
            await eventually(lambda: all(now - then < 7 for now, then in zip(descriptors_and_threads(), before, strict=True)))

    asyncio.run(run())


def test_a_pair_listens_at_the_workers_address_alone() -> None:
    def listening() -> set[str]:
        lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")}
        return {fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine}

    async def run() -> None:
        before = listening()
        async with rig(GLOO) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 20)
            opened = listening() - before
            assert len(opened) == 4, "a port for each connection at each end"
            assert all(place.startswith("0100007F:") for place in opened)

    asyncio.run(run())


def test_an_address_that_is_not_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(_: gloo.GlooWires) -> list[Any]:
        return [gloo.ProcessGroupGloo.create_device(hostname="192.0.2.1", lazy_init=False)]

    monkeypatch.setattr(gloo.GlooWires, "devices", elsewhere)

    async def run() -> None:
        async with rig(GLOO) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 20)
            assert "The gloo pair of 127.0.0.1 is lost" in prefill.diary.errors["a"].message

    asyncio.run(run())


def test_rendezvous_is_nothing_to_say_on_a_shared_memory_lane() -> None:
    async def run() -> None:
        async with rig(SHM) as (prefill, decode, address, exchange):
            await hand_over(prefill, decode, address, "a", 20)
            exchange.lanes[0].send(Rendezvous(0, "key", b"value"))
            await eventually(lambda: not prefill.source._lanes)

    asyncio.run(run())


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 60), length=st.integers(1, 60), group=st.sampled_from([0, 1]), data=st.data())
def test_what_is_packed_is_unpacked(start: int, length: int, group: int, data: st.DataObject) -> None:
    """Between different blocks, beginning and ending anywhere in them; nothing beside it changes."""
    layers = LAYOUT.groups[group].layers
    span = Span(group, layers, start, start + length)
    first, count = start // BLOCK, -(-span.stop // BLOCK) - start // BLOCK
    here, there = (tuple(data.draw(st.permutations(range(12)))[:count]) for _ in range(2))
    source, destination = Pool.allocate(layout_with(12)), Pool.allocate(layout_with(12))
    tables = tuple((-1,) * first + here for _ in LAYOUT.groups)
    write(source, LAYOUT.on(0), "a", layers, span.start, span.stop, tables)
    slot = torch.zeros(1 << 20, dtype=torch.uint8)
    crossing = Crossing(routes(LAYOUT, LAYOUT)[0], LAYOUT, LAYOUT)
    checksum = packing.pack(source, crossing, span, here, slot)
    assert packing.unpack(destination, crossing, span, there, slot, checksum)
    for index, layer in enumerate(layers):
        cache = destination.caches[group][index]
        for position in range(span.start, span.stop):
            held = cache[there[position // BLOCK - first], :, :, position % BLOCK]
            assert torch.equal(held, expected_rows("a", layer, LAYOUT.groups[group], position, position + 1)[0].to(cache.dtype))
            held.zero_()
        assert not cache.any()
    source.close()
    destination.close()


def test_a_piece_whose_blocks_were_taken_back_before_it_was_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's epoch word changes while it is packed, and nobody says so."""
    taken_back = False

    def pack(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: torch.Tensor) -> int:
        nonlocal taken_back
        if not taken_back:
            taken_back = True
            for word in range(SLOTS):
                pool.set_word(word, 77)
        return packing.pack(pool, crossing, span, blocks, slot)

    monkeypatch.setattr(slots, "pack", pack)

    async def run() -> None:
        async with rig(GLOO) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 40)
            await decode.diary.wait("released", "a")
            assert decode.diary.of("a") == ["offered", "failed", "released"]
            assert "checksum of piece 0" in decode.diary.errors["a"].message

    asyncio.run(run())


def test_a_defect_while_a_piece_is_unpacked_ends_the_pair_and_its_fences_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, broken = packing.unpack, True

    def unpacked(pool: Pool, crossing: Crossing, span: Span, blocks: tuple[int, ...], slot: torch.Tensor, expected: int) -> bool:
        if broken:
            raise MemoryError("there is none")
        return unpack(pool, crossing, span, blocks, slot, expected)

    monkeypatch.setattr(slots, "unpack", unpacked)

    async def run() -> None:
        nonlocal broken
        async with rig(GLOO) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 40)
            await decode.diary.wait("released", "a")
            assert "The gloo pair of 127.0.0.1 is lost: there is none" in decode.diary.errors["a"].message
            broken = False
            await hand_over(prefill, decode, address, "b", 40)
            assert decode.diary.of("b") == ["offered", "committed"]

    asyncio.run(run())


def test_what_was_in_a_slot_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equally long pieces the first is sent twice, seal and all."""
    send = Outgoing._send
    monkeypatch.setattr(Outgoing, "_send", lambda pair, slot, length: send(pair, 0, length))

    async def run() -> None:
        full = replace(LAYOUT, groups=LAYOUT.groups[:1], num_blocks=LAYOUT.num_blocks[:1])
        async with rig(GLOO, here=full, there=full) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 40, at_once=True)
            assert decode.diary.of("a") == ["offered", "committed"]
            await hand_over(prefill, decode, address, "b", 40, at_once=True)
            await decode.diary.wait("released", "b")
            assert decode.diary.of("b") == ["offered", "failed", "released"]

    asyncio.run(run())


def test_staging_gives_turns() -> None:
    staging = Staging()
    staging.want("a")
    assert staging.next() is None, "not before the pair stands"
    staging.connected()
    staging.want("b")
    for owner in ("a", "b") * (CREDITS // 2):
        assert staging.next() == owner
        staging.take(owner)
        staging.check()
    assert staging.next() is None, "no credit is left"
    staging.sent(1)
    assert staging.next() == "a"
    staging.sent(CREDITS)
    with pytest.raises(AssertionError):
        staging.check()


def test_a_turn_that_is_given_up_is_no_ones() -> None:
    staging = Staging()
    staging.connected()
    staging.want("a")
    staging.want("b")
    staging.drop("a")
    assert staging.next() == "b"
    staging.drop("b")
    assert staging.next() is None
    staging.check()
