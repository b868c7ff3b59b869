"""The NCCL wire's own rules, over a fake of NCCL: nobody is stuck, nothing is used that is aborted, and the words for what goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from diptych.core.errors import TransferFailed
from diptych.kv_transfer import slots
from diptych.kv_transfer.crossing import Crossing
from diptych.kv_transfer.cuda_streams import Streams
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.slots import SEAL_BYTES
from diptych.kv_transfer.transports import nccl, two_sided, wiring
from fake_nccl import Fabric, FakeNccl
from kv_rig import ENGINE, FAKE_GPU_NCCL, FAKE_NCCL, LAYERS, TOKENS, DecodeEnd, PrefillEnd, eventually, faked, rig


@pytest.fixture
def fabric(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fabric]:
    made = Fabric()
    monkeypatch.setattr(wiring, "Nccl", lambda _: FakeNccl(made))
    yield made
    assert made.alive == 0
    assert made.broken_rules == []


def threads(begin: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(begin)]


class Settling:
    """A communicator whose call is in progress for so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def settled(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize(("looks", "paused"), [(0, 0), (5, 0), (12, 1)])
def test_a_call_that_settles_at_once_is_not_waited_for_with_a_pause(looks: int, paused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wire, taken = nccl.NcclWire(0, FakeNccl(Fabric())), list[float]()
    monkeypatch.setattr(wire, "_communicator", Settling(looks))
    monkeypatch.setattr(wire, "_given_up", SimpleNamespace(wait=taken.append))
    wire._settle()
    assert len(taken) == paused


async def hand_over(prefill: PrefillEnd, decode: DecodeEnd, address: str, transfer_id: str, tokens: int = 100) -> None:
    decode.destination.expect(transfer_id)
    prefill.offer(transfer_id, address, tokens)
    await prefill.compute_all(transfer_id)
    await prefill.diary.wait("released", transfer_id)


def test_what_crosses_is_what_was_handed_over_a_seal_of_each_piece_and_a_byte_of_each_pair(fabric: Fabric) -> None:
    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a")
            await hand_over(prefill, decode, address, "b", 333)
            seals, rest = divmod(fabric.bytes_moved - 1 - decode.bytes["a"] - decode.bytes["b"], SEAL_BYTES)
            assert rest == 0
            assert 2 <= seals <= 100

    asyncio.run(run())


def test_a_silent_peer_is_given_up(fabric: Fabric) -> None:
    async def run() -> None:
        async with rig(FAKE_NCCL, lease_s=2) as (prefill, decode, address, exchange):
            await hand_over(prefill, decode, address, "a")
            fabric.silent = True
            decode.destination.expect("b")
            prefill.offer("b", address, 100)
            await prefill.diary.wait("granted", "b")
            prefill.compute("b", LAYERS, 0, 100)  # no Commit: its Ack is awaited as long as the pair is
            await prefill.diary.wait("released", "b")
            await decode.diary.wait("released", "b")
            message = prefill.diary.errors["b"].message
            assert "The nccl pair of 127.0.0.1 is lost: Timed out: the other end neither gave nor took anything for 2 s." in message
            await eventually(lambda: fabric.alive == 0)
            fabric.silent = False
            await hand_over(prefill, decode, address, "c")
            assert decode.diary.of("c") == ["offered", "committed"]
            assert len(exchange.lanes) == 2

    asyncio.run(run())


def test_what_nccl_says_is_told(fabric: Fabric) -> None:
    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a")
            decode.destination.expect("b")
            prefill.offer("b", address, 100)
            await prefill.diary.wait("granted", "b")
            fabric.error = "remote process exited or there was a network error"
            prefill.compute("b", LAYERS, 0, 100)
            prefill.source.commit("b", TOKENS)
            await prefill.diary.wait("released", "b")
            assert isinstance(prefill.diary.errors["b"], TransferFailed)
            assert "NCCL says: remote process exited" in prefill.diary.errors["b"].message
            await decode.diary.wait("released", "b")
            fabric.error = None
            await hand_over(prefill, decode, address, "c")

    asyncio.run(run())


def test_a_lane_that_breaks_while_it_connects_aborts_at_once(fabric: Fabric) -> None:
    """The byte that a pair begins with never crosses, so both ends wait; none for the 30 s that they may."""
    fabric.silent = True

    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, exchange):
            decode.destination.expect("a")
            prefill.offer("a", address, 20)
            await prefill.diary.wait("granted", "a")
            await eventually(lambda: len(fabric.made) == 2)
            exchange.lanes[0].cut()
            await prefill.diary.wait("released", "a")
            await decode.diary.wait("released", "a")
            await eventually(lambda: fabric.alive == 0)

    asyncio.run(run())


def test_a_destination_that_never_joins(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    join = FakeNccl.join

    def refuse(binding: FakeNccl, unique_id: bytes, end: int) -> object:
        if end == 1:
            raise ConnectionError("NCCL says: no such device")
        return join(binding, unique_id, end)

    monkeypatch.setattr(FakeNccl, "join", refuse)

    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 20)
            assert "no such device" in prefill.diary.errors["a"].message

    asyncio.run(run())


def test_no_id_is_made_for_a_destination_that_is_not_ready_to_join(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    unique_id, slots_for = FakeNccl.unique_id, two_sided.slots_for

    def make(binding: FakeNccl) -> bytes:
        made.append(unique_id(binding))
        return made[-1]

    monkeypatch.setattr(FakeNccl, "unique_id", make)

    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, _):

            def refuse(pool: Pool, crossing: Crossing, slot_bytes: int) -> slots.Slots:
                if pool in decode.pools:
                    raise RuntimeError("CUDA out of memory")
                return slots_for(pool, crossing, slot_bytes)

            monkeypatch.setattr(two_sided, "slots_for", refuse)
            await hand_over(prefill, decode, address, "a", 20)
            assert made == []
            monkeypatch.setattr(two_sided, "slots_for", slots_for)
            await hand_over(prefill, decode, address, "b", 20)
            assert len(made) == 1

    asyncio.run(run())


def test_pairs_come_and_go_without_a_trace(fabric: Fabric) -> None:
    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, exchange):
            for number in range(10):
                await hand_over(prefill, decode, address, f"t{number}", 20)
                assert fabric.alive == 2
                exchange.lanes[-1].cut()
                await eventually(lambda: not prefill.source._lanes)
                await eventually(lambda: fabric.alive == 0)
            assert threads("diptych-pair") == []

    asyncio.run(run())


def test_pairs_that_are_made_again_use_the_memory_and_streams_of_those_before(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator keeps for a stream what was given back on it."""
    monkeypatch.setattr(slots, "STREAMS", Streams())

    async def run() -> None:
        async with rig(FAKE_GPU_NCCL) as (prefill, decode, address, exchange):
            for number in range(4):
                await hand_over(prefill, decode, address, f"t{number}", 20)
                exchange.lanes[-1].cut()
                await eventually(lambda: not prefill.source._lanes)
                await eventually(lambda: not threads("diptych-pair"))

    with faked(FAKE_GPU_NCCL, monkeypatch):
        asyncio.run(run())
        assert ENGINE.gpu is not None
        assert ENGINE.gpu.streams == 2


@pytest.mark.parametrize("what", ["abort", "close"])
def test_a_pair_that_cannot_be_ended_as_it_should_has_ended(what: str, fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = getattr(nccl.NcclWire, what)

    def refuse(wire: nccl.NcclWire) -> None:
        rightly(wire)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(nccl.NcclWire, what, refuse)

    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, exchange):
            await hand_over(prefill, decode, address, "a", 20)
            exchange.lanes[-1].cut()
            await eventually(lambda: not threads("diptych-pair"))

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("broken", ["no wait", "other bytes"])
def test_the_fake_can_tell(fabric: Fabric, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wire that says that a piece has come before it has, or that sends another, is found."""
    if broken == "no wait":
        monkeypatch.setattr(nccl.NcclWork, "wait", lambda work, timeout: None)
    else:
        send = nccl.NcclWire.send
        monkeypatch.setattr(nccl.NcclWire, "send", lambda wire, data: send(wire, data.clone().random_()))

    async def run() -> None:
        async with rig(FAKE_NCCL) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 900)
            assert "checksum of piece 0 is wrong" in decode.diary.errors["a"].message

    asyncio.run(run())
    fabric.broken_rules.clear()
