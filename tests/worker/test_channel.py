"""Two ends of a channel over a real connection, one of them sometimes a bare socket that behaves as no rank would."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import pytest
from diptych.core.errors import Unavailable
from diptych.worker import channel as channel_module
from diptych.worker.channel import Channel, Kind, hear, pack_entry, say, unpack_entry

WAIT_S = 60.0


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    return here, there


class End:
    """A channel that keeps what it hears."""

    def __init__(self, connection: socket.socket, *, silence_s: float = 6.0) -> None:
        self.heard: SimpleQueue[tuple[Kind, bytes]] = SimpleQueue()
        self.deaths: SimpleQueue[BaseException] = SimpleQueue()
        self.channel = Channel(connection, "rank 7", lambda *said: self.heard.put(said), self.deaths.put, silence_s=silence_s)
        self.channel.start()


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = connected()
    yield here, there
    for each in (here, there):
        each.close()


def test_messages_of_many_threads_arrive_whole_and_each_threads_in_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Also those of several reads, and those of which several come in one."""
    one, other = map(End, sockets)

    def speak(number: int) -> None:
        for count in range(200):
            one.channel.send(Kind.STEP, bytes([number]) + count.to_bytes(4, "little") + bytes(1000 * (count % 90 == 0) * 200))

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    heard = [other.heard.get(timeout=WAIT_S) for _ in range(800)]
    for thread in threads:
        thread.join()
    assert {kind for kind, _ in heard} == {Kind.STEP}
    for number in range(4):
        counts = [int.from_bytes(payload[1:5], "little") for _, payload in heard if payload[0] == number]
        assert counts == list(range(200))
    other.channel.send(Kind.RAN)
    assert one.heard.get(timeout=WAIT_S) == (Kind.RAN, b"")
    assert one.deaths.empty()
    assert other.deaths.empty()


def test_the_end_of_the_stream_is_a_loss_told_once(sockets: tuple[socket.socket, socket.socket]) -> None:
    here, there = sockets
    one = End(here)
    there.close()
    error = one.deaths.get(timeout=WAIT_S)
    assert isinstance(error, Unavailable)
    assert "rank 7" in error.message
    for _ in range(3):
        one.channel.send(Kind.STEP, b"x")
    assert one.deaths.empty()


def test_silence_is_a_loss(sockets: tuple[socket.socket, socket.socket]) -> None:
    one = End(sockets[0], silence_s=0.2)
    assert "said nothing for 0.2 s" in str(one.deaths.get(timeout=WAIT_S))


def test_pings_keep_both_ends_alive(sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "PING_EVERY_S", 0.05)
    one, other = (End(each, silence_s=4.0) for each in sockets)
    with pytest.raises(Empty):
        one.deaths.get(timeout=5.0)
    assert other.deaths.empty()
    assert one.heard.empty(), "nobody hears of a ping"


def test_a_message_nobody_understands_is_a_loss(sockets: tuple[socket.socket, socket.socket]) -> None:
    one = End(sockets[0])
    sockets[1].sendall(b"\xfe\0\0\0\0")
    assert isinstance(one.deaths.get(timeout=WAIT_S), ValueError)


def test_an_end_that_both_agree_on_is_no_loss(sockets: tuple[socket.socket, socket.socket]) -> None:
    one, other = End(sockets[0]), End(sockets[1])
    one.channel.end()
    one.channel.send(Kind.END)
    assert other.heard.get(timeout=WAIT_S) == (Kind.END, b"")
    other.channel.end()
    other.channel.close()
    one.channel.wait_ended()
    assert one.deaths.empty()
    assert other.deaths.empty()


def test_a_first_message_is_heard_without_a_byte_of_the_next(sockets: tuple[socket.socket, socket.socket]) -> None:
    here, there = sockets
    say(there, Kind.HELLO, b"who")
    say(there, Kind.STORE, b"next")
    assert hear(here, 10) == (Kind.HELLO, b"who")
    assert hear(here, 10) == (Kind.STORE, b"next")
    say(there, Kind.HELLO, bytes(11))
    with pytest.raises(ValueError, match="11 bytes"):
        hear(here, 10)


def test_before_there_is_a_channel_the_end_of_the_stream_is_none(sockets: tuple[socket.socket, socket.socket]) -> None:
    here, there = sockets
    there.sendall(b"\1\5\0\0\0wh")
    there.close()
    assert hear(here, 10) is None


@pytest.mark.parametrize(("key", "value"), [("", b""), ("stage0/0", bytes(range(256))), ("é", b"\0")])
def test_an_entry_of_a_store_comes_back(key: str, value: bytes) -> None:
    assert unpack_entry(pack_entry(key, value)) == (key, value)
