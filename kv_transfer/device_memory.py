"""A pool's bytes on a GPU: one allocation, whose handle and whose layers' events stand in the shared file behind the epoch words.

    shared file    nonce, epoch words (`geometry`) | handle of the allocation, then of each layer's event, 64 bytes each
    allocation     the layers, at the offsets of `geometry`; what would be nonce and words is not used

The engine says `stored` when it has *asked* the GPU for a layer's stores; the layer's event then stands behind them, and whoever reads the
layer has its own stream wait for the event. So no engine waits on the host. A later `stored` of a layer moves its event on: a reader
may then wait for more than it needs, never for less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import ConfigError
from . import cuda_runtime, cuda_streams
from .cuda_runtime import HANDLE_BYTES
from .geometry import HEADER_BYTES, padded
from .memory import tensor_at
from .shared_file import SharedFile

_exported: list[torch.cuda.Event] = []
"""All that this process has handed out. They go with it: a peer may still have one open, and to destroy it then is undefined in CUDA."""


class DeviceMemory:
    """`kv_transfer.pool.Memory`. Once it is closed no tensor of it may be used."""

    def __init__(self, size: int, layers: Sequence[int], device: torch.device) -> None:
        """Raises `ConfigError`: field `kv_tokens` if the device has not that much memory free, `device` without NVIDIA's bindings, or with
        some that its driver is too old for."""
        self._device = device
        with torch.cuda.device(device):
            self._address = _allocated(size, device)
            self._events = {layer: cuda_streams.shared_event() for layer in layers}
            _exported.extend(self._events.values())
            handles = [cuda_runtime.handle_of(self._address), *map(cuda_streams.handle_of, self._events.values())]
        self.whole = tensor_at(self._address, size, device)
        self.shared = SharedFile(shared_bytes(len(layers)))
        self.shared.mapped[HEADER_BYTES : HEADER_BYTES + HANDLE_BYTES * len(handles)] = b"".join(handles)

    def stored(self, layer: int) -> None:
        """All that the current stream was asked for so far is what is stored of `layer`."""
        self._events[layer].record(torch.cuda.current_stream(self._device))

    def await_stored(self, layer: int) -> None:
        """The current stream goes on when what was `stored` of `layer` lies there."""
        self._events[layer].wait(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """The allocation goes with the process, which ends right after: a peer may still have it mapped, and to free it then is undefined
        in CUDA. Nor is the GPU waited for: what it waits for itself may be a peer that has died."""
        del self.whole
        self.shared.close()


def shared_bytes(layers: int) -> int:
    """Length of the shared file of a pool of so many layers."""
    return HEADER_BYTES + padded(HANDLE_BYTES * (1 + layers))


def handles(shared: memoryview, layers: int) -> list[bytes]:
    """From a shared file: the allocation's, then of each layer's event."""
    return [
        bytes(shared[start : start + HANDLE_BYTES])
        for start in range(HEADER_BYTES, HEADER_BYTES + HANDLE_BYTES * (1 + layers), HANDLE_BYTES)
    ]


def _allocated(size: int, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    try:
        if size <= free:
            return cuda_runtime.allocate(size)
    except ImportError as error:
        raise ConfigError("A KV pool on a GPU needs NVIDIA's bindings: pip install 'diptych[gpu]'.", field="device") from error
    except cuda_runtime.DriverTooOld as error:
        raise ConfigError(f"There is no KV pool on {device}: {error}.", field="device") from error
    except RuntimeError as error:
        raise ConfigError(f"The KV pool's {size >> 20} MiB cannot be had on {device}: {error}.", field="kv_tokens") from error
    raise ConfigError(f"The KV pool needs {size >> 20} MiB and {device} has {free >> 20} MiB free; lower kv_tokens.", field="kv_tokens")
