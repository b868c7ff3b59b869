"""GPU memory of our own, and another process's, by NVIDIA's bindings: what torch does not offer.

torch's allocator cuts its tensors out of larger allocations, and a CUDA IPC handle is that of a whole allocation; torch's own sharing
(`UntypedStorage._share_cuda_`) is private and counts references in a named file in /dev/shm. So a pool is one cudaMalloc, and its
handle is the pool's alone. Nothing is imported before a GPU is used; what goes wrong is a `RuntimeError`, as with torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

HANDLE_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE."""


class DriverTooOld(RuntimeError):
    """For the CUDA that NVIDIA's bindings are of."""


def allocate(size: int) -> int:
    """The address of `size` bytes of zeros on the current device. Raises `RuntimeError` if it has not so many, `DriverTooOld`."""
    runtime = _runtime()
    address = int(_done(runtime.cudaMalloc(size)))
    _done(runtime.cudaMemset(address, 0, size))
    _done(runtime.cudaDeviceSynchronize())  # torch's streams do not wait for the one that this went to
    return address


def handle_of(address: int) -> bytes:
    """Of the allocation that begins at `address`, for `open_handle` in another process of the host."""
    opaque = _done(_runtime().cudaIpcGetMemHandle(address))  # it must live until its bytes are read
    return ctypes.string_at(opaque.getPtr(), HANDLE_BYTES)


def open_handle(handle: bytes) -> int:
    """Where the allocation of another process lies in the address space of the current device, which may be another than the
    allocation's if the two reach each other. Raises `RuntimeError` if they do not, or in the process that made it."""
    runtime = _runtime()
    opaque = runtime.cudaIpcMemHandle_t()
    ctypes.memmove(opaque.getPtr(), handle, HANDLE_BYTES)
    return int(_done(runtime.cudaIpcOpenMemHandle(opaque, runtime.cudaIpcMemLazyEnablePeerAccess)))


def close_handle(address: int) -> None:
    _done(_runtime().cudaIpcCloseMemHandle(address))


def new_stream() -> int:
    """A handle of a stream of the current device, which waits for no other."""
    runtime = _runtime()
    return int(_done(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))


def _runtime() -> Any:
    from cuda.bindings import runtime  # type: ignore[import-not-found,unused-ignore]  # not where there is no GPU

    return runtime


def _done(answer: tuple[Any, ...]) -> Any:
    """The value in an answer of the runtime."""
    runtime = _runtime()
    error, *values = answer
    if error == runtime.cudaError_t.cudaErrorInsufficientDriver:
        ours, drivers = (version // 1000 for _, version in (runtime.cudaRuntimeGetVersion(), runtime.cudaDriverGetVersion()))
        raise DriverTooOld(
            f"the GPU's driver is for CUDA {drivers}, and the installed cuda-bindings need one for {ours}: "
            f"pip install 'cuda-bindings<{drivers + 1}', or a newer driver"
        )
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA says {runtime.cudaGetErrorString(error)[1].decode()} ({error.name})")
    return values[0] if values else None
