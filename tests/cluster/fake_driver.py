"""NVIDIA's driver as a host with given GPUs has it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FakeDriver:
    """What `visible_gpus` asks of libcuda. `version`: as CUDA writes it, 13000 for 13.0. `gpus`: name, bytes, compute capability."""

    version: int
    gpus: Sequence[tuple[str, int, tuple[int, int]]]

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDriverGetVersion(self, found: Any) -> int:
        found._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, found: Any) -> int:
        found._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, found: Any, number: int) -> int:
        found._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: ctypes.c_int) -> int:
        name.value = self.gpus[handle.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, found: Any, handle: ctypes.c_int) -> int:
        found._obj.value = self.gpus[handle.value][1]
        return 0

    def cuDeviceGetAttribute(self, found: Any, which: int, handle: ctypes.c_int) -> int:
        found._obj.value = self.gpus[handle.value][2][which - 75]
        return 0
