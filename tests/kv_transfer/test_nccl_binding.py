"""What nccl4py is asked, call by call; its names and signatures were read off 0.6."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diptych.kv_transfer.cuda_streams import Streams
from diptych.kv_transfer.transports import nccl_binding
from diptych.kv_transfer.transports.nccl_binding import IN_PROGRESS, SUCCESS, Nccl
from fake_cuda import FakeGpu

ID = bytes(range(128))


class FakeCommunicator:
    """`nccl.core.Communicator`."""

    def __init__(self, *joined: object) -> None:
        self.joined = joined
        self.state = IN_PROGRESS
        self.asked: list[tuple[Any, ...]] = []

    def get_async_error(self) -> int:
        return self.state

    def get_last_error(self) -> str:
        return "socket closed"

    def send(self, sendbuf: torch.Tensor, peer: int, *, stream: int) -> None:
        self.asked.append(("send", len(sendbuf), peer, stream))

    def recv(self, recvbuf: torch.Tensor, peer: int, *, stream: int) -> None:
        self.asked.append(("recv", len(recvbuf), peer, stream))

    def abort(self) -> None:
        self.asked.append(("abort",))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeCommunicator]:
    communicators: list[FakeCommunicator] = []

    def init(nranks: int, rank: int, unique_id: object, config: object) -> FakeCommunicator:
        communicators.append(FakeCommunicator(nranks, rank, unique_id, config))
        return communicators[-1]

    core = SimpleNamespace(
        get_unique_id=lambda: ID,
        UniqueId=SimpleNamespace(from_bytes=lambda content: ("id", content)),
        NCCLConfig=lambda **settings: settings,
        Communicator=SimpleNamespace(init=init),
        get_error_string=lambda state: f"error {state}",
    )
    monkeypatch.setattr(nccl_binding, "_core", lambda: core)
    monkeypatch.setattr(nccl_binding, "STREAMS", Streams())
    FakeGpu().install(monkeypatch)
    return communicators


def test_each_call(made: list[FakeCommunicator]) -> None:
    binding = Nccl(torch.device("cpu"))
    ours = binding.join(binding.unique_id(), 1)
    (theirs,) = made
    assert theirs.joined == (2, 1, ("id", ID), {"blocking": False, "max_ctas": 4})
    assert not ours.settled()
    theirs.state = SUCCESS
    assert ours.settled()
    ours.send(torch.zeros(5, dtype=torch.uint8))
    ours.receive(torch.zeros(7, dtype=torch.uint8))
    assert ours.mark()()
    assert ours.probe().shape == (1,)
    ours.abort()
    assert theirs.asked == [("send", 5, 0, 1), ("recv", 7, 0, 1), ("abort",)]


def test_each_communicator_has_a_stream_that_no_other_has_while_it_lives(made: list[FakeCommunicator]) -> None:
    binding = Nccl(torch.device("cpu"))
    pairs = [binding.join(ID, 0) for _ in range(40)]
    for pair in pairs:
        pair.send(torch.zeros(1, dtype=torch.uint8))
    assert len({theirs.asked[0][-1] for theirs in made}) == 40
    pairs.pop(7).abort()
    pairs.append(binding.join(ID, 0))
    pairs[-1].send(torch.zeros(1, dtype=torch.uint8))
    assert made[-1].asked[0][-1] == made[7].asked[0][-1]


def test_an_error_is_told_in_nccls_words(made: list[FakeCommunicator]) -> None:
    ours = Nccl(torch.device("cpu")).join(ID, 0)
    made[0].state = 6
    with pytest.raises(ConnectionError, match=r"NCCL says: error 6\. socket closed"):
        ours.settled()
