"""Streams and events of a GPU, as the transports use them; torch leaves theirs untyped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from . import cuda_runtime

FIRST_LOOK_S, EVERY_S = 50e-6, 1e-3
"""Between one look and the next. Each needs the interpreter, which the engine's thread wants for its launches: 1,000 a second of every pair
that waits are enough."""


class Streams:
    """For one use. Whoever takes one has it to himself: torch's own are 32, handed out in turn, so that the 33rd stands behind what the
    first was asked for. Who is given one that another gave back finds his memory there too, which torch's allocator keeps by stream."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)

    def take(self, device: torch.device) -> torch.cuda.Stream:
        try:
            return self._free[device].pop()
        except IndexError:
            with torch.cuda.device(device):
                return torch.cuda.ExternalStream(cuda_runtime.new_stream(), device)  # type: ignore[no-untyped-call]

    def give_back(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """When all that it was asked for is done."""
        self._free[device].append(stream)


def mark(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """Behind all that `stream`, by default the current one, was asked for so far. A thread that waits for it sleeps: a stream's own
    `synchronize` would keep a core busy."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream or torch.cuda.current_stream())
    return event


def pauses() -> Iterator[float]:
    """Seconds, for who can only look whether a GPU is done: each by a quarter longer than the last, so that nothing is found much later,
    in proportion, than it came; a wait of 10 ms takes 19 looks."""
    pause = FIRST_LOOK_S
    while True:
        yield pause
        pause = min(1.25 * pause, EVERY_S)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of the host, good once what the current stream was asked for is done."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def shared_event() -> torch.cuda.Event:
    """One that other processes can wait for, of the current device; nothing is before it yet."""
    event = torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def handle_of(event: torch.cuda.Event) -> bytes:
    """Of a shared event."""
    handle: bytes = event.ipc_handle()  # type: ignore[no-untyped-call]
    return handle


def open_event(device: torch.device, handle: bytes) -> torch.cuda.Event:
    """Another process's. Raises `RuntimeError` if it cannot be opened."""
    event: torch.cuda.Event = torch.cuda.Event.from_ipc_handle(device, handle)  # type: ignore[no-untyped-call]
    return event
