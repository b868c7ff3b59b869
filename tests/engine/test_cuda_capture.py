"""What is asked of CUDA where a decode step is captured, without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from diptych.engine.cuda_capture import CudaCapture
from torch import Tensor
from triton.runtime.errors import OutOfResources


class Stream:
    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of the captures."""
    modes: list[str] = []

    @contextmanager
    def graph(*_: object, capture_error_mode: str = "global", **__: object) -> Iterator[None]:
        modes.append(capture_error_mode)
        yield

    fakes = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "graph": graph,
        "CUDAGraph": object,
        "graph_pool_handle": object,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return modes


def test_other_threads_may_use_the_gpu_meanwhile(asked: list[str]) -> None:
    CudaCapture(torch.device("cuda", 0))(lambda: torch.zeros(1))
    assert asked == ["thread_local"]


def test_a_kernel_that_a_gpu_has_no_room_for_is_a_capture_that_failed(asked: list[str]) -> None:
    def run() -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    with pytest.raises(RuntimeError, match="shared memory, Required: 300000"):
        CudaCapture(torch.device("cuda", 0))(run)
    assert asked == []
