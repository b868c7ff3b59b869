"""`nccl.Binding` by nccl4py: the calls, and the stream and events that they are ordered by."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..cuda_streams import Streams, mark

SUCCESS, IN_PROGRESS = 0, 7
"""ncclResult_t."""
STREAMS = Streams()
CTAS = 4
"""The most blocks of threads, and channels, of a communicator: each has a multiprocessor of the decode GPU to itself from when a piece is
announced until it has come, and 9 MiB of buffers at the receiving end. NCCL would take up to 32 over NVLink."""


def installed() -> bool:
    return find_spec("nccl") is not None


class Nccl:
    """For one device. Nothing is imported before the first pair."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def unique_id(self) -> bytes:
        return bytes(_core().get_unique_id())

    def join(self, unique_id: bytes, end: int) -> NcclCommunicator:
        return NcclCommunicator(self._device, unique_id, end)


class NcclCommunicator:
    """`nccl.Communicator`, with a stream of its own: what waits for one peer must not hold up what goes to another."""

    def __init__(self, device: torch.device, unique_id: bytes, end: int) -> None:
        core = _core()
        self._device, self._peer = device, 1 - end
        with torch.cuda.device(device):
            self._stream = STREAMS.take(device)
            with torch.cuda.stream(self._stream):
                self._probe = torch.zeros(1, dtype=torch.uint8, device=device)
            config = core.NCCLConfig(blocking=False, max_ctas=CTAS)
            self._communicator = core.Communicator.init(2, end, core.UniqueId.from_bytes(unique_id), config)

    def settled(self) -> bool:
        core = _core()
        state = int(self._communicator.get_async_error())
        if state in (SUCCESS, IN_PROGRESS):
            return state == SUCCESS
        raise ConnectionError(f"NCCL says: {core.get_error_string(state)}. {self._communicator.get_last_error()}".strip())

    def send(self, data: Tensor) -> None:
        with torch.cuda.device(self._device):
            self._communicator.send(data, self._peer, stream=self._stream.cuda_stream)

    def receive(self, data: Tensor) -> None:
        with torch.cuda.device(self._device):
            self._communicator.recv(data, self._peer, stream=self._stream.cuda_stream)

    def mark(self) -> Callable[[], bool]:
        done: Callable[[], bool] = mark(self._stream).query
        return done

    def probe(self) -> Tensor:
        return self._probe

    def abort(self) -> None:
        """The kernels under way end; the memory that they read or wrote may be freed when this returns."""
        with torch.cuda.device(self._device):
            self._communicator.abort()
            self._stream.synchronize()
        STREAMS.give_back(self._device, self._stream)


def _core() -> Any:
    import nccl.core  # type: ignore[import-not-found,unused-ignore]  # not where there is no GPU

    return nccl.core
