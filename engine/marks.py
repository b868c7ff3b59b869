"""How far a device has come with what it was asked for, and what it computed brought to this host. On a CPU all is done at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.recordings import Doing
from ..core.spans import span


class Mark(Protocol):
    """A place in what a device is asked for; to be set again and again."""

    def record(self) -> None:
        """Behind all that has been asked for."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has come there; not at all if the mark was never set."""
        ...


class _Passed:
    def record(self) -> None:
        return None

    def synchronize(self) -> None:
        return None


def new_mark(device: torch.device) -> Mark:
    """On a GPU in the current stream; whoever waits sleeps, and leaves its core and the interpreter to others."""
    return torch.cuda.Event(blocking=True) if device.type == "cuda" else _Passed()  # type: ignore[no-untyped-call]


def arriving(numbers: Tensor, step: int) -> Callable[[], list[Any]]:
    """Have a device's numbers [n], of this step, copied into this host's memory, each time into other memory. To be called for them, on any
    thread: it waits until the device has done all that it was asked for before."""
    if numbers.is_cpu:
        return numbers.tolist
    device = numbers.device
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=device.type == "cuda")
    here.copy_(numbers, non_blocking=True)
    there = new_mark(device)
    there.record()

    def arrived() -> list[Any]:
        with span(Doing.UNDER_WAY, step):
            there.synchronize()
        return here.tolist()

    return arrived
