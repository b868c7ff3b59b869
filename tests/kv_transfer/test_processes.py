"""The contract suite where the other end is a process: killed, stopped, restarted; nothing of it is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from diptych.core.errors import TransferFailed
from kv_rig import (
    BETWEEN_PROCESSES,
    LONG_S,
    DecodeEnd,
    Exchange,
    PrefillEnd,
    Way,
    decode_end,
    pool_sockets,
    pool_sockets_of,
    prefill_end,
)

HERE = Path(__file__).parent
LEASE_S = 2.0
"""Where its end is waited for; elsewhere it is `LONG_S`."""
SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
"""Both ends on one GPU."""
pytestmark = [
    pytest.mark.parametrize("way", BETWEEN_PROCESSES),
    pytest.mark.timeout(300),  # processes that import torch first, on a machine that may be busy
]


@pytest.fixture(autouse=True)
def shared_gpu(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHARED_GPU.items():
        monkeypatch.setenv(name, value)


class Peer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.address = ""

    def do(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def hear(self, what: str, transfer_id: str | None = None) -> dict[str, Any]:
        """The line that says `what`, among those that came or as it comes."""
        for line in self.lines:
            if line["what"] == what and line.get("id") == transfer_id:
                return line
        assert self.process.stdout is not None
        async with asyncio.timeout(90):  # a busy machine starts a process that imports torch in 30 s
            while True:
                line = json.loads(await self.process.stdout.readline())
                self.lines.append(line)
                if line["what"] == what and line.get("id") == transfer_id:
                    return line

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def peer(role: str, way: Way, lease_s: float = LONG_S) -> AsyncIterator[Peer]:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent / "fakes"))), **SHARED_GPU}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "kv_peer.py"),
        role,
        str(lease_s),
        way.transport,
        str(way.device),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        there = Peer(process)
        there.address = (await there.hear("ready"))["address"]
        sockets = pool_sockets_of(process.pid)
        assert sockets
        yield there
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()
    assert not sockets & set(pool_sockets().values()), "its socket went with it"


async def from_peer(there: Peer, here: DecodeEnd, address: str, transfer_id: str) -> None:
    here.destination.expect(transfer_id)
    there.do(do="offer", id=transfer_id, to=address, tokens=100)
    there.do(do="finish", id=transfer_id)
    await here.diary.wait("committed", transfer_id)
    await there.hear("handed over", transfer_id)


async def to_peer(here: PrefillEnd, there: Peer, transfer_id: str) -> None:
    there.do(id=transfer_id)
    here.offer(transfer_id, there.address, 100)
    await here.compute_all(transfer_id)
    await here.diary.wait("handed over", transfer_id)
    await there.hear("committed", transfer_id)


def test_source_killed_and_restarted(way: Way) -> None:
    async def run() -> None:
        async with decode_end(way, Exchange(), True, LONG_S) as (here, address):
            async with peer("prefill", way) as there:
                await from_peer(there, here, address, "a")
                here.destination.expect("b")
                there.do(do="offer", id="b", to=address, tokens=200)
                await there.hear("granted", "b")
                there.do(do="compute", id="b", layers=[0, 1, 2], stop=200)
                await asyncio.sleep(0.05)
                there.signal(signal.SIGKILL)
                await here.diary.wait("released", "b", within_s=LONG_S / 2)
                assert isinstance(here.diary.errors["b"], TransferFailed)
                assert "lane" in here.diary.errors["b"].message
            async with peer("prefill", way) as there:
                await from_peer(there, here, address, "c")
                assert here.diary.of("b") == ["offered", "failed", "released"]

    asyncio.run(run())


def test_source_stopped_and_continued(way: Way) -> None:
    """Stopped for longer than its lease: the grant ends, and whatever it does when it wakes is not counted."""

    async def run() -> None:
        async with decode_end(way, Exchange(), True, LEASE_S) as (here, address), peer("prefill", way, LEASE_S) as there:
            here.destination.expect("a")
            there.do(do="offer", id="a", to=address, tokens=200)
            await there.hear("granted", "a")
            there.do(do="compute", id="a", layers=[0, 1], stop=200)
            await asyncio.sleep(0.05)
            there.signal(signal.SIGSTOP)
            there.do(do="compute", id="a", layers=[2, 3, 4], stop=200)
            await here.diary.wait("released", "a")
            assert "lease" in here.diary.errors["a"].message
            there.signal(signal.SIGCONT)
            await there.hear("released", "a")
            assert here.diary.of("a") == ["offered", "failed", "released"]
            await from_peer(there, here, address, "b")

    asyncio.run(run())


def test_destination_killed_and_restarted_at_another_address(way: Way) -> None:
    async def run() -> None:
        async with prefill_end(way, None, LONG_S) as here:
            async with peer("decode", way) as there:
                await to_peer(here, there, "a")
                there.do(id="b")
                here.offer("b", there.address, 200)
                await here.diary.wait("granted", "b")
                here.compute("b", (0, 1), 0, 200)
                await asyncio.sleep(0)
                there.signal(signal.SIGKILL)
                await here.diary.wait("released", "b", within_s=LONG_S / 2)
                assert isinstance(here.diary.errors["b"], TransferFailed)
                here.offer("c", there.address, 20)
                await here.diary.wait("released", "c")
            async with peer("decode", way) as there:
                await to_peer(here, there, "d")

    asyncio.run(run())


def test_destination_stopped_and_continued(way: Way) -> None:
    """Stopped after the Commit: the source takes its blocks back after one lease and writes over them; the destination, awake,
    must not count what it copies then."""

    async def run() -> None:
        async with prefill_end(way, None, LEASE_S) as here, peer("decode", way, LEASE_S) as there:
            await to_peer(here, there, "a")
            there.do(id="b")
            here.offer("b", there.address, 200)
            await here.diary.wait("granted", "b")
            there.signal(signal.SIGSTOP)
            await here.compute_all("b")
            await here.diary.wait("released", "b")
            ends = ("No Ack", "Timed out") if way.transport.two_sided else ("No Ack",)  # the Commit has gone with what was not sent
            assert any(words in here.diary.errors["b"].message for words in ends)
            there.signal(signal.SIGCONT)
            assert (await there.hear("released", "b"))["error"]
            assert not any(line["what"] == "committed" and line["id"] == "b" for line in there.lines)
            await to_peer(here, there, "c")

    asyncio.run(run())
