"""A device that computes only when a test says so: what is asked of it waits in a stream, as on a GPU that is behind.

Its tensors are torch's private device to whoever asks, and lie in this host's memory. Whatever is asked for gets memory of its own at once,
full of poison, and is computed when the stream comes to it, from what its inputs hold then. So a host that waits is an error here, and
memory that is written again too soon gives other numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend()
THERE = torch.device("privateuseone", 0)
aten = torch.ops.aten
TELLING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default, aten.bincount.default}


class HostWaits(AssertionError):
    """The host asked for what the device has not computed."""


class There(torch.Tensor):
    """A tensor of the device; `here`: its memory."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=THERE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device")


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max - 1)


class LazyDevice(TorchDispatchMode):
    """`with` it, torch knows the device, outside of inference mode. What is asked of it is done at once until `lags`."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: deque[Callable[[], Any]] = deque()
        self.lagging = False

    @contextmanager
    def lags(self) -> Iterator[None]:
        """From now on nothing is computed but by `come_to`."""
        self.lagging = True
        try:
            yield
        finally:
            self.lagging = False
            self._rest()

    def come_to(self, mark: LazyMark) -> None:
        while not mark.passed:
            self._next()

    def ask(self, call: Callable[[], Any]) -> None:
        self.stream.append(call)
        if not self.lagging:
            self._rest()

    def result_of(self, like: torch.Tensor, call: Callable[[], torch.Tensor]) -> There:
        """What `call` gives, of the shape and type of `like`."""
        here = poisoned(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype))
        self.ask(lambda: here.copy_(call()))
        return There(here)

    def _rest(self) -> None:
        while self.stream:
            self._next()

    def _next(self) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            self.stream.popleft()()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(each, There) for each in tensors) and (device is None or torch.device(device).type != THERE.type):
            return func(*args, **kwargs)
        if self.lagging and func in TELLING:
            raise HostWaits(f"{func} tells the host what the device has")
        if func is aten.copy_.default:
            return self._copied(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._moved(args[0], kwargs)
        if any(each.dim() for each in tensors if not isinstance(each, There)):
            raise HostWaits(f"{func} of both memories")
        return self._asked(func, args, {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs)

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(There, lambda each: each.here, (args, kwargs))
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        if returned is not None and not returned.is_write:
            return tree_map_only(torch.Tensor, There, func(*args, **kwargs))
        if returned is not None:
            self.ask(lambda: func(*args, **kwargs))
            return There(args[0])
        shapes = tree_map_only(torch.Tensor, lambda each: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta"),
                               (args, kwargs))  # fmt: skip
        if "device" in kwargs:
            shapes[1]["device"] = torch.device("meta")
        like = func(*shapes[0], **shapes[1])
        found = tree_map_only(torch.Tensor, lambda each: poisoned(torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)), like)
        into = tree_flatten(found)[0]

        def compute() -> None:
            for place, each in zip(into, tree_flatten(func(*args, **kwargs))[0], strict=True):
                place.copy_(each)

        if func not in {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}:
            self.ask(compute)
        return tree_map_only(torch.Tensor, There, found)

    def _copied(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        crosses = isinstance(target, There) != isinstance(source, There)
        if crosses and self.lagging and not non_blocking:
            raise HostWaits("a copy that is waited for")
        to, of = (each.here if isinstance(each, There) else each for each in (target, source))
        if not isinstance(target, There):
            poisoned(to)
        self.ask(lambda: to.copy_(of))
        return target

    def _moved(self, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        to, dtype = torch.device(kwargs.get("device") or source.device), kwargs.get("dtype") or source.dtype
        crosses = (to.type == THERE.type) != isinstance(source, There)
        if crosses and self.lagging and (to.type == "cpu" or not kwargs.get("non_blocking")):
            raise HostWaits("a tensor that is moved and waited for")
        here = source.here if isinstance(source, There) else source
        made = self.result_of(torch.empty_strided(here.shape, here.stride(), dtype=dtype, device="meta"), lambda: here)
        return made if to.type == THERE.type else made.here


class LazyMark:
    """`engine.marks.Mark` of the device."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device
        self.passed = True
        self.recorded = 0

    def record(self) -> None:
        self.passed = False
        self.recorded += 1
        self._device.ask(lambda number=self.recorded: setattr(self, "passed", number == self.recorded))

    def synchronize(self) -> None:
        if not self.passed:
            raise HostWaits("a mark that the device has not come to")
