"""Ranks of a worker under mutual TLS: they meet, they speak both ways at once, and nobody else is let in or followed."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
from certificates import Issued, strangers
from diptych.core.errors import Unavailable
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.security import TlsFiles
from diptych.worker.channel import Channel, Connection, Kind
from diptych.worker.meeting import Hello, address_of, join, listen, meet
from diptych.worker.secure import accepted, connected

WAIT_S = 60.0
LAYOUT = Layout("model", (CacheGroup(CacheKind.FULL, (0, 1), 2, 8, DType.FLOAT32),), 16, (8,), tp=2)
LEADER = Hello(0, "p0", LAYOUT, 8)
RANK = replace(LEADER, rank=1)


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    return Issued.below(tmp_path / "ca")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def begin(pool: ThreadPoolExecutor, tls: TlsFiles | None) -> tuple[str, Future[dict[int, Connection]]]:
    listener = listen("127.0.0.1")
    return address_of(listener, "127.0.0.1"), pool.submit(meet, listener, LEADER, tls=tls, within_s=WAIT_S)


def test_two_threads_at_each_end_speak_and_hear_at_once(pool: ThreadPoolExecutor, issued: Issued) -> None:
    address, met = begin(pool, issued.internal())
    follower = join(address, RANK, tls=issued.internal("rank"), within_s=WAIT_S)
    heard: list[SimpleQueue[tuple[Kind, bytes]]] = [SimpleQueue(), SimpleQueue()]
    deaths: SimpleQueue[BaseException] = SimpleQueue()
    ends = [
        Channel(connection, "other", lambda *said, queue=queue: queue.put(said), deaths.put)
        for connection, queue in zip((met.result(WAIT_S)[1], follower), heard, strict=True)
    ]
    for end in ends:
        end.start()
    threads = [
        threading.Thread(target=lambda end=end, n=n: [end.send(Kind.STEP, bytes([n]) * 3 * (i**2)) for i in range(150)])
        for end in ends
        for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for queue in heard:
        said = [queue.get(timeout=WAIT_S) for _ in range(300)]
        for n in (1, 2):
            lengths = [len(payload) for _, payload in said if payload[:1] == bytes([n])]
            assert lengths == [3 * i**2 for i in range(1, 150)]
    for thread in threads:
        thread.join()
    for end in ends:
        end.end()
    for end in ends:
        end.close()
    assert deaths.empty()


def test_who_is_not_of_the_cluster_is_no_rank_and_the_right_one_still_comes(
    pool: ThreadPoolExecutor, issued: Issued, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address, met = begin(pool, issued.internal())
    for files in (None, *strangers(tmp_path, issued).values()):
        with pytest.raises(Unavailable):
            join(address, RANK, tls=files, within_s=WAIT_S)
    with socket.create_connection(tuple(address.split(":"))) as stranger:  # type: ignore[arg-type]
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100)[:1] in (b"", b"\x15"), "nothing, or TLS' own alert"
    rank = join(address, RANK, tls=issued.internal("rank"), within_s=WAIT_S)
    met.result(WAIT_S)[1].close()
    rank.close()
    assert caplog.text.count("is none: ") == 4


def test_a_rank_does_not_follow_a_leader_that_is_none(pool: ThreadPoolExecutor, issued: Issued, tmp_path: Path) -> None:
    for files in (issued.internal("named", name="elsewhere"), *strangers(tmp_path, issued).values()):
        here, there = socket.socketpair()
        with here, there:
            there.settimeout(WAIT_S)
            leader = pool.submit(accepted, there, files)
            with pytest.raises(ssl.SSLCertVerificationError):
                connected(here, issued.internal())
            here.close()
            with pytest.raises(OSError, match=r"alert|EOF|Broken|reset"):
                leader.result(WAIT_S)
