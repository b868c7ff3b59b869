"""A KV pair belongs to one lane: who has not been told what is said there gets no memory, no connection, and no byte of KV."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import Issued, strangers
from diptych.core.proofs import SECRET_BYTES, STRANGER, proof
from diptych.core.security import TlsFiles
from diptych.kv_transfer import door
from diptych.kv_transfer.pool import Pool
from diptych.kv_transfer.transports.gloo import CONNECTIONS, GlooWire, GlooWires
from diptych.kv_transfer.transports.proving import SECRET, agree, prove
from diptych.kv_transfer.transports.rendezvous import ToldStore
from diptych.kv_transfer.transports.shm import attach
from diptych.kv_transfer.transports.two_sided import DESTINATION, SOURCE
from diptych.rpc.lane import dial_lane
from kv_rig import GLOO, LAYOUT, LONG_S, SHM, DecodeEnd, Exchange, PrefillEnd, Way, decode_end, eventually, layout_with, prefill_end
from torch.distributed import PrefixStore, ProcessGroupGloo

NOBODY = 65534
WAIT_S = 10.0
pytestmark = pytest.mark.usefixtures("nothing_left")


# Shared memory: the socket that hands it out.


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool.allocate(layout_with(8))
    yield made
    made.close()


class Open:
    """The pool's door stands open meanwhile."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __enter__(self) -> None:
        asyncio.get_running_loop().add_reader(self._pool.listener, self._pool.hand_out)

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._pool.listener)


async def knock(pool: Pool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """With the challenge that came."""
    reader, writer = await asyncio.open_unix_connection(f"\0{pool.endpoint.socket}")
    return reader, writer, await reader.readexactly(door.CHALLENGE_BYTES)


async def given(pool: Pool, said: bytes | None) -> bytes:
    """What comes to one who answers so (None: as one who knows), without the descriptor: a byte if there is one."""
    reader, writer, challenge = await knock(pool)
    writer.write(hmac.digest(pool.endpoint.nonce, challenge, "sha256") if said is None else said)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def test_who_was_not_told_gets_no_memory(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with Open(pool):
            assert await given(pool, None) == b"\0", "who knows"
            for said in (b"x" * 32, pool.endpoint.nonce * 2, pool.endpoint.socket[-32:].encode()):
                assert await given(pool, said) == b""
            (await attach("P", pool.endpoint, pool.layout)).close()

    asyncio.run(run())
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 3
    assert all(f"process {os.getpid()} of user {os.getuid()}" in line and "does not know what was said on a lane" in line for line in told)


def test_the_worker_is_told_who_was_turned_away_at_any_rank() -> None:
    async def run() -> None:
        async with prefill_end(SHM, None, LONG_S, like=replace(LAYOUT, tp=2)) as prefill:
            for pool in prefill.pools:
                assert await given(pool, None) == b"\0"
            assert prefill.turned_away_said == 0
            for number, pool in enumerate(prefill.pools, 1):
                assert await given(pool, b"x" * 32) == b""
                await eventually(lambda number=number: prefill.turned_away_said == number)

    asyncio.run(run())


def test_an_answer_that_was_overheard_is_good_once(pool: Pool) -> None:
    async def run() -> None:
        with Open(pool):
            reader, writer, challenge = await knock(pool)
            answer = hmac.digest(pool.endpoint.nonce, challenge, "sha256")
            writer.write(answer)
            assert await reader.read() == b"\0"
            writer.close()
            assert await given(pool, answer) == b""

    asyncio.run(run())


def test_who_says_nothing_is_hung_up_on_and_keeps_nobody_waiting(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "AT_ONCE", 3)

    async def run() -> None:
        with Open(pool):
            monkeypatch.setattr(door, "ANSWER_S", LONG_S)
            silent = [await knock(pool) for _ in range(2)]
            (await attach("P", pool.endpoint, pool.layout)).close()
            silent.append(await knock(pool))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await knock(pool)
            for _, writer, _ in silent:
                writer.close()
            await eventually(lambda: caplog.text.count("did not say what was said on a lane") == 3)
            monkeypatch.setattr(door, "ANSWER_S", 0.2)
            reader, writer, _ = await knock(pool)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
    assert "3 processes ask for the pool at once" in caplog.text
    assert caplog.text.count("did not say what was said on a lane") == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
def test_another_user_gets_none_whatever_he_knows(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> bytes:
        with Open(pool), socket.socket(socket.AF_UNIX) as connection:
            os.seteuid(NOBODY)
            try:
                connection.connect(f"\0{pool.endpoint.socket}")
            finally:
                os.seteuid(0)
            return await asyncio.to_thread(connection.recv, 100)

    assert asyncio.run(run()) == b"", "he is not even asked"
    assert f"of user {NOBODY} asked for the pool's memory and is another user's" in caplog.text


# Lanes: without a certificate of the cluster there is none, and so no pair.


async def handed_over(prefill: PrefillEnd, decode: DecodeEnd, address: str, transfer_id: str) -> list[str]:
    """What the source was told."""
    decode.destination.expect(transfer_id)
    prefill.offer(transfer_id, address, 40)
    await prefill.compute_all(transfer_id)
    await prefill.diary.wait("released", transfer_id)
    return prefill.diary.of(transfer_id)


@pytest.mark.parametrize("way", [SHM, GLOO], ids=str)
def test_who_has_no_certificate_of_the_cluster_gets_no_lane_and_no_pair(way: Way, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a source that none has let in, nor a destination that a source does not know: it is told not even where the pool is."""
    caplog.set_level(logging.INFO)
    issued = Issued.below(tmp_path / "ca")
    ours, outside = issued.internal("ours"), {"nothing": None, **strangers(tmp_path, issued)}

    async def run() -> None:
        async with decode_end(way, Exchange(), True, LONG_S, tls=issued.internal()) as (decode, address):
            for fault, files in outside.items():
                async with prefill_end(way, partial(dial_lane, tls=files), LONG_S) as prefill:
                    assert await handed_over(prefill, decode, address, fault) == ["failed", "released"], fault
                    assert decode.diary.of(fault) == []
            async with prefill_end(way, partial(dial_lane, tls=ours), LONG_S) as prefill:
                assert await handed_over(prefill, decode, address, "ours") == ["granted", "handed over", "released"]
        for fault, files in outside.items():
            shown = None if files is None else TlsFiles(files.cert, files.key)
            async with (
                decode_end(way, Exchange(), True, LONG_S, tls=shown) as (decode, address),
                prefill_end(way, partial(dial_lane, tls=ours), LONG_S) as prefill,
            ):
                assert await handed_over(prefill, decode, address, fault) == ["failed", "released"], fault
                assert decode.diary.of(fault) == []

    asyncio.run(run())
    assert caplog.text.count("KV comes from P") == 1


# gloo: whoever comes to its port first.


def test_a_store_says_what_is_set_by_now_without_waiting() -> None:
    """NCCL's monitor asks that, from a thread of its own."""
    first, _ = lane(told=True)
    assert not first.check(["key"])
    first.set("key", b"value")
    assert first.check(["key"])
    assert not first.check(["key", "other"])


def lane(*, told: bool) -> tuple[ToldStore, ToldStore]:
    """What both ends of a pair have said on their lane; unless `told` the second does not hear the first one's secret."""
    first = ToldStore(lambda key, value: second.heard(key, value) if told or key != SECRET else None, WAIT_S)
    second = ToldStore(first.heard, WAIT_S)
    return first, second


def outcome(future: Future[Any]) -> str:
    try:
        future.result(WAIT_S)
    except ConnectionError as error:
        return str(error)
    return "connected"


@pytest.fixture
def wires() -> GlooWires:
    return GlooWires("127.0.0.1")


@pytest.mark.parametrize("taken", range(CONNECTIONS))
@pytest.mark.parametrize("end", [SOURCE, DESTINATION])
def test_a_stranger_in_the_peers_place_gets_no_kv(end: int, taken: int, wires: GlooWires, caplog: pytest.LogCaptureFixture) -> None:
    """He has come by gloo's own rendezvous to one of the connections, knows the form of all that is said, and all of it but the secret."""
    here, there = lane(told=False)
    if end == DESTINATION:
        here.heard(SECRET, b"s" * SECRET_BYTES)

    def stranger() -> bytes:
        groups = []
        for number, device in enumerate(wires.devices()):
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
            options._devices, options._timeout, options._threads = [device], timedelta(seconds=WAIT_S), 1
            groups.append(ProcessGroupGloo(PrefixStore(str(number), there), 1 - end, 2, options))
        heard = torch.empty(32, dtype=torch.uint8)
        for number, group in enumerate(groups[: taken + 1]):
            secret = bytes(SECRET_BYTES) if number == taken else here.get(SECRET)
            shown = torch.frombuffer(bytearray(proof(secret, 1 - end, end)), dtype=torch.uint8)
            group.send([shown], end, 0).wait()
            group.recv([heard], end, 0).wait()
        return bytes(heard.tolist())

    with ThreadPoolExecutor(2) as threads:
        honest, other = threads.submit(GlooWire(end, wires).connect, here), threads.submit(stranger)
        assert outcome(honest) == STRANGER
        # What he has heard he cannot show to the other: it is what *this* end shows to its peer.
        assert len(other.result(WAIT_S)) == 32
    assert STRANGER in caplog.text


def test_an_end_of_another_lane_is_a_stranger(wires: GlooWires) -> None:
    here, there = lane(told=False)
    there.heard(SECRET, b"another lane's".ljust(SECRET_BYTES))
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(GlooWire(end, wires).connect, store) for end, store in ((SOURCE, here), (DESTINATION, there))]
        assert [outcome(each) for each in ends] == [STRANGER, STRANGER]
        here, there = lane(told=True)
        ends = [threads.submit(GlooWire(end, wires).connect, store) for end, store in ((SOURCE, here), (DESTINATION, there))]
        assert [outcome(each) for each in ends] == ["connected", "connected"]


def test_a_stranger_who_says_nothing_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Silent:
        def wait(self, timeout: timedelta) -> None:
            raise ConnectionError(f"Timed out after {timeout}")

    class Nobody(GlooWire):
        def send(self, data: torch.Tensor) -> Silent:
            return Silent()

        receive = send

    store, _ = lane(told=True)
    agree(SOURCE, store)
    with pytest.raises(ConnectionError, match="Timed out"):
        prove(Nobody(SOURCE, GlooWires("127.0.0.1")), SOURCE, store, 1.0)
    assert "did not show that it knows what was said on the lane (Timed out" in caplog.text
