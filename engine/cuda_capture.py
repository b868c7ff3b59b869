"""Capturing on a GPU. Not run on one yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.triton_kernels import triton_refusals


class CudaCapture:
    """`decode_graphs.Capture` by CUDA graphs, all of which share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Raises `RuntimeError` if CUDA cannot capture it, or Triton not compile it for this GPU."""
        try:
            return self._captured(run)
        except triton_refusals() as error:
            raise RuntimeError(str(error)) from error

    def _captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()  # compiles Triton's kernels and has cuBLAS take its workspace: neither can be captured
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile, those of transports, is none of the capture's business.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def untold_bytes(device: torch.device) -> int:
    """What is taken of the GPU, by anyone, that this process' torch does not count: graphs are among it."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
