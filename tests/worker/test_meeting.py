"""How ranks find each other, over real connections: who is one of ours is let in, who is not hears by name what differs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from diptych.core.errors import ConfigError, Unavailable
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.plain_json import to_json
from diptych.worker.channel import Kind, hear, say
from diptych.worker.meeting import GREETING, HELLO_BYTES, Hello, address_of, join, listen, meet, refused

WAIT_S = 60.0
LAYOUT = Layout("model", (CacheGroup(CacheKind.FULL, (0, 1, 2, 3), 2, 8, DType.FLOAT32),), 16, (8,), tp=2, stages=(2, 2))
LEADER = Hello(0, "p0", LAYOUT, 8)


def follower(rank: int, **changes: object) -> Hello:
    return replace(LEADER, rank=rank, **changes)


class Meeting:
    """A leader that waits on a thread, and followers that come on others."""

    def __init__(self, pool: ThreadPoolExecutor, within_s: float = WAIT_S) -> None:
        self.pool = pool
        listener = listen("127.0.0.1")
        self.address = address_of(listener, "127.0.0.1")
        self.met: Future[dict[int, socket.socket]] = pool.submit(meet, listener, LEADER, within_s=within_s)

    def come(self, hello: Hello) -> Future[socket.socket]:
        return self.pool.submit(join, self.address, hello, within_s=WAIT_S)

    def stranger(self) -> socket.socket:
        host, port = self.address.split(":")
        return socket.create_connection((host, int(port)))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_all_are_let_in_when_all_are_there(pool: ThreadPoolExecutor) -> None:
    meeting = Meeting(pool)
    first = [meeting.come(follower(rank)) for rank in (3, 1)]
    with pytest.raises(ConfigError):
        meeting.come(follower(9)).result(WAIT_S)  # by now the leader has taken the first two, or will
    assert not any(future.done() for future in first)
    last = meeting.come(follower(2))
    there = meeting.met.result(WAIT_S)
    assert sorted(there) == [1, 2, 3]
    for rank, future in ((3, first[0]), (1, first[1]), (2, last)):
        say(there[rank], Kind.STEP, bytes([rank]))
        assert hear(future.result(WAIT_S), HELLO_BYTES) == (Kind.STEP, bytes([rank]))


@pytest.mark.parametrize(
    ("hello", "field", "words"),
    [
        (follower(1, worker_id="p1"), "worker_id", "leader of p0, not of p1"),
        (follower(1, layout=replace(LAYOUT, fingerprint="other")), "fingerprint", "model at its leader, other at rank 1"),
        (follower(1, layout=replace(LAYOUT, tp=1)), "tp", "2 at its leader, 1 at rank 1"),
        (follower(1, layout=replace(LAYOUT, stages=(1, 3))), "stages", "(2, 2) at its leader"),
        (follower(1, layout=replace(LAYOUT, num_blocks=(9,))), "num_blocks", "(8,) at its leader, (9,) at rank 1"),
        (follower(1, slots=9), "slots", "8 at its leader, 9 at rank 1"),
        (follower(4), "rank", "no rank 4"),
        (follower(0), "rank", "no rank 0"),
    ],
)
def test_who_differs_hears_in_what_and_the_right_one_may_still_come(pool: ThreadPoolExecutor, hello: Hello, field: str, words: str) -> None:
    meeting = Meeting(pool)
    with pytest.raises(ConfigError) as caught:
        meeting.come(hello).result(WAIT_S)
    assert caught.value.field == field
    assert words in caught.value.message
    right = [meeting.come(follower(rank)) for rank in (1, 2, 3)]
    assert sorted(meeting.met.result(WAIT_S)) == [1, 2, 3]
    for future in right:
        future.result(WAIT_S)


def test_a_rank_comes_once() -> None:
    assert refused(LEADER, follower(1), {1}) is not None
    assert refused(LEADER, follower(1), {2, 3}) is None


def test_who_speaks_another_protocol_is_sent_away(pool: ThreadPoolExecutor) -> None:
    meeting = Meeting(pool)
    for words in (b"diptych rank 0\n[]", b"diptych rank 1\n[]", b"diptych rank 1\n{"):
        with meeting.stranger() as stranger:
            stranger.settimeout(WAIT_S)
            say(stranger, Kind.HELLO, words)
            assert hear(stranger, HELLO_BYTES) is None
    with meeting.stranger() as stranger:
        stranger.settimeout(WAIT_S)
        stranger.sendall(b"GET /")
        assert hear(stranger, HELLO_BYTES) is None
    for rank in (1, 2, 3):
        meeting.come(follower(rank))
    meeting.met.result(WAIT_S)


def test_one_that_leaves_before_the_others_come_ends_the_meeting(pool: ThreadPoolExecutor) -> None:
    meeting = Meeting(pool)
    waiting = meeting.come(follower(3))
    with meeting.stranger() as rank:
        say(rank, Kind.HELLO, GREETING + to_json(follower(2)))
    with pytest.raises(Unavailable, match="Rank 2 of this worker has gone"):
        meeting.met.result(WAIT_S)
    with pytest.raises(Unavailable):
        waiting.result(WAIT_S)


def test_who_does_not_come_is_named(pool: ThreadPoolExecutor) -> None:
    meeting = Meeting(pool, within_s=0.2)
    with pytest.raises(Unavailable, match=r"\[1, 2, 3\] have not come"):
        meeting.met.result(WAIT_S)


def test_without_a_leader_a_follower_ends(pool: ThreadPoolExecutor) -> None:
    listener = listen("127.0.0.1")
    address = address_of(listener, "127.0.0.1")
    future = pool.submit(join, address, follower(1))
    connection, _ = listener.accept()
    hear(connection, HELLO_BYTES)
    connection.close()
    listener.close()
    with pytest.raises(Unavailable, match="has gone"):
        future.result(WAIT_S)
    with pytest.raises(Unavailable, match="finds no leader"):
        join(address, follower(1))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        listen("203.0.113.1")
    assert caught.value.field == "listen"
