"""As much of CUDA as `kv_transfer` uses, over memory of the host, so that what a GPU would be asked is seen without one.

The engine's stores are late: they are made when somebody waits for an event behind them, or has looked at it, as a GPU makes them when it
comes to it. A reader that neither waits for a layer's event nor looks until it has come reads what was there before. What transports ask
for is done at once.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any

import pytest
import torch
from diptych.kv_transfer import cuda_runtime, cuda_streams
from diptych.kv_transfer.slots import DeviceSlots
from diptych.kv_transfer.transports import two_sided


class FakeGpu:
    """Its one stream that is late is the engine's."""

    def __init__(self) -> None:
        self._asked: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()
        self._done = 0
        self.allocated: dict[int, Any] = {}
        self.mapped = 0
        self.silence: Silence | None = None
        """What is recorded now comes when it is over, as of a process that was killed or stopped."""
        self.waited_for: list[Silence] = []
        """By a stream: until it is over no memory can be unmapped."""
        self.streams = 0
        """How many were made."""
        self.runtime = FakeRuntime(self)
        self._streams = threading.local()
        self.exported: dict[bytes, Any] = {}
        """What stands behind a handle: an address or an event."""

    @property
    def asked(self) -> int:
        """How many stores the engine has asked for."""
        with self._lock:
            return self._done + len(self._asked)

    def ask(self, store: Callable[[], None]) -> None:
        with self._lock:
            self._asked.append(store)

    def run_to(self, number: int) -> None:
        """Make the first `number` stores."""
        with self._lock:
            while self._done < number:
                self._asked.popleft()()
                self._done += 1

    def come_to(self, number: int) -> bool:
        """Whether so many are made; they are by the next look."""
        with self._lock:
            made = self._done >= number
            self.run_to(number)
            return made

    def finish(self) -> None:
        self.run_to(self.asked)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Event:
            """`torch.cuda.Event`."""

            def __init__(event, **options: bool) -> None:
                assert set(options) <= {"blocking", "interprocess"}
                event.behind = 0
                event.stores = options.get("interprocess", False)
                event.silence: Silence | None = None

            def record(event, stream: FakeStream | None = None) -> None:
                event.behind = self.asked if event.stores else 0
                event.silence = self.silence or (stream or self.stream()).silence

            def wait(event, stream: FakeStream | None = None) -> None:
                if event.silence is None or event.silence.over:
                    self.run_to(event.behind)
                else:
                    (stream or self.stream()).silence = event.silence
                    self.waited_for.append(event.silence)

            def query(event) -> bool:
                if event.silence is not None and not event.silence.over:
                    return False
                return self.come_to(event.behind)

            def synchronize(event) -> None:
                assert event.query(), "this does not return"

            def ipc_handle(event) -> bytes:
                return self.export(event)

            @staticmethod
            def from_ipc_handle(device: torch.device, handle: bytes) -> object:
                return self.exported[handle]

        for name, replaced in {
            "Event": Event,
            "ExternalStream": FakeStream,
            "stream": self.using,
            "device": lambda device: nullcontext(),
            "current_stream": lambda device=None: self.stream(),
            "synchronize": self.finish,
            "mem_get_info": lambda device: (1 << 40, 1 << 40),
        }.items():
            monkeypatch.setattr(torch.cuda, name, replaced)
        monkeypatch.setattr(cuda_runtime, "_runtime", lambda: self.runtime)
        monkeypatch.setattr(cuda_streams, "to_host", lambda tensor: tensor.clone())
        monkeypatch.setattr(two_sided, "slots_for", DeviceSlots)

    def stream(self) -> FakeStream:
        """This thread's current one."""
        found: FakeStream = getattr(self._streams, "current", None) or FakeStream()
        return found

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        self._streams.current = stream
        try:
            yield
        finally:
            self._streams.current = None

    def export(self, thing: object) -> bytes:
        handle = secrets.token_bytes(cuda_runtime.HANDLE_BYTES)
        self.exported[handle] = thing
        return handle


class Silence:
    over = False


class FakeStream:
    def __init__(self, handle: int = 0, device: object = None) -> None:
        self.cuda_stream = handle
        self.silence: Silence | None = None
        """It stands before it."""

    def synchronize(self) -> None:
        assert self.silence is None or self.silence.over, "this does not return"


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidResourceHandle = 400


class Handle:
    """Opaque, as NVIDIA's bindings have it: bytes at an address."""

    def __init__(self, content: bytes = bytes(cuda_runtime.HANDLE_BYTES)) -> None:
        self._buffer = ctypes.create_string_buffer(content, cuda_runtime.HANDLE_BYTES)

    def getPtr(self) -> int:
        return ctypes.addressof(self._buffer)


class FakeRuntime:
    """`cuda.bindings.runtime`: each call answers with an error and a value."""

    cudaError_t = Error
    cudaIpcMemHandle_t = Handle
    cudaIpcMemLazyEnablePeerAccess = 1
    cudaStreamNonBlocking = 1

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.driver = 13000

    def cudaRuntimeGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 13050

    def cudaDriverGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, self.driver

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        if self.driver < 13000:
            return Error.cudaErrorInsufficientDriver, None
        if size > 1 << 32:
            return Error.cudaErrorMemoryAllocation, None
        buffer = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self._gpu.allocated[address] = buffer
        return Error.cudaSuccess, address

    def cudaMemset(self, address: int, value: int, size: int) -> tuple[Error]:
        ctypes.memset(address, value, size)
        return (Error.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        assert flags == self.cudaStreamNonBlocking
        self._gpu.streams += 1
        return Error.cudaSuccess, self._gpu.streams

    def cudaIpcGetMemHandle(self, address: int) -> tuple[Error, Handle]:
        return Error.cudaSuccess, Handle(self._gpu.export(address))

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[Error, int | None]:
        address = self._gpu.exported.get(ctypes.string_at(handle.getPtr(), cuda_runtime.HANDLE_BYTES))
        if address not in self._gpu.allocated:
            return Error.cudaErrorInvalidResourceHandle, None
        self._gpu.mapped += 1
        return Error.cudaSuccess, address

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[Error]:
        assert all(silence.over for silence in self._gpu.waited_for), "this does not return"
        self._gpu.mapped -= 1
        return (Error.cudaSuccess,)

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, error.name.encode()
