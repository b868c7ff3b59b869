"""Which GPUs this host has for us, and which rank computes on which. Asks the driver itself: torch is not loaded here."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU_FRACTION = 0.9
"""Of a GPU's memory what its rank takes where nobody named a fraction; the rest is for contexts longer than those it warms up with."""
CPU_FRACTION = 0.5
"""Of a host's available memory what its ranks may take together where nobody named a fraction."""
NO_INT8_ON_GPU = "int8 is for workers on a CPU, the kernels for GPUs do not read it yet: leave kv_dtype out, or say device: cpu."
LEAST_CAPABILITY = (8, 0)
"""Compute capability that the kernels need: before it GPUs multiply no bf16."""
_ROUNDING = 1e-6
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """`key`: by which `CUDA_VISIBLE_DEVICES` names it. `size`: bytes. `runs`: the newest CUDA that its driver runs. `capability`: for
    computing, as CUDA counts it. Both (major, minor), None where nobody was asked."""

    key: str
    name: str
    size: int
    runs: tuple[int, int] | None = None
    capability: tuple[int, int] | None = None

    @property
    def able(self) -> bool:
        """Whether the kernels run on it."""
        return self.capability is None or self.capability >= LEAST_CAPABILITY

    @property
    def kind(self) -> str:
        """As Ray calls it, whose nodes have it as a resource (`accelerator_type:H100`): its name without its maker's, up to its number."""
        words = []
        for word in self.name.split()[1:]:
            words.append(word.partition("-")[0])
            if any(map(str.isdigit, word)):
                break
        return "-".join(words) or self.name


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that a process with this process's environment can use; none without NVIDIA's driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    keys = environment[VISIBLE].split(",") if environment.get(VISIBLE) else [str(number) for number in range(count.value)]
    version = ctypes.c_int()
    runs = None if driver.cuDriverGetVersion(ctypes.byref(version)) else (version.value // 1000, version.value % 1000 // 10)
    return [_gpu(driver, number, key.strip(), runs) for number, key in zip(range(count.value), keys, strict=False)]


def _gpu(driver: ctypes.CDLL, number: int, key: str, runs: tuple[int, int] | None) -> Gpu:
    handle, name, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(handle), number)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
    major, minor = ctypes.c_int(), ctypes.c_int()
    known = not any(driver.cuDeviceGetAttribute(ctypes.byref(value), which, handle) for value, which in ((major, _MAJOR), (minor, _MINOR)))
    return Gpu(key, name.value.decode(), size.value, runs, (major.value, minor.value) if known else None)


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for; None of a CPU build. Without importing it."""
    found = importlib.util.find_spec("torch")
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    built = re.search(r"^cuda\b[^=]*= *['\"](.+)['\"]", version.read_text(), re.MULTILINE) if version and version.is_file() else None
    return built[1] if built else None


def hindrance(gpus: Sequence[Gpu], cuda: str | None) -> str | None:
    """Why a torch for that CUDA, None for a CPU build, computes on none of these; None if it can on one at least."""
    if cuda is None:
        return f"the torch installed here is a CPU build. {_there(gpus)}"
    if not gpus:
        return "this host has no GPU that CUDA can use; device: cpu would work"
    runs = gpus[0].runs
    if runs is not None and runs[0] < int(cuda.partition(".")[0]):  # within a major version CUDA promises that older drivers run it
        return (
            f"the driver here runs CUDA up to {_version(runs)}, and torch is built for {cuda}: install a newer driver, or torch for CUDA "
            f"{runs[0]}. {_there(gpus)}"
        )
    if not any(gpu.able for gpu in gpus):
        found = ", ".join(f"{gpu.key}: {gpu.name}, {_version(gpu.capability)}" for gpu in gpus if gpu.capability)
        return f"the kernels need compute capability {_version(LEAST_CAPABILITY)}, which no GPU here has ({found}); device: cpu would work"
    return None


def chosen(wanted: str, gpus: Sequence[Gpu], cuda: str | None) -> Sequence[Gpu]:
    """The GPUs to compute on, none for the CPU. `wanted`: the config's `device`. Raises `ConfigError` if there are not what it asks for."""
    if wanted == "cpu":
        return ()
    why = hindrance(gpus, cuda)
    if why is None:
        return [gpu for gpu in gpus if gpu.able]
    if wanted == "auto":
        return ()
    raise ConfigError(f"device: cuda, but {why}.", field="device")


def assign(gpus: Sequence[Gpu], workers: Sequence[tuple[str, Sequence[float]]], taken: Mapping[str, float]) -> list[list[Gpu]]:
    """A GPU for each rank of `workers`, each its name and what fraction of a GPU's memory each of its ranks takes. Ranks of one worker
    have a GPU each, since NCCL wants that; those of several share one if their fractions allow it. `taken`: by key, what others have.
    Raises `ConfigError` if they do not fit.
    """
    left = [1.0 + _ROUNDING - taken.get(gpu.key, 0.0) for gpu in gpus]
    found = []
    for name, fractions in workers:
        places: list[int] = []
        for fraction in fractions:
            place = next((place for place, room in enumerate(left) if room >= fraction and place not in places), None)
            if place is None:
                raise _too_many(gpus, workers, name)
            left[place] -= fraction
            places.append(place)
        found.append([gpus[place] for place in places])
    return found


def share_of(ranks: int, gpus: int) -> float:
    """What each of so many takes of its GPU's memory if they are spread evenly, in whole percent."""
    return int(100 * GPU_FRACTION / -(-ranks // gpus)) / 100


def _too_many(gpus: Sequence[Gpu], workers: Sequence[tuple[str, Sequence[float]]], name: str) -> ConfigError:
    ranks = sum(len(fractions) for _, fractions in workers)
    share = f"; workers may share a GPU with a memory_fraction of at most {share_of(ranks, len(gpus)):g} each" if gpus else ""
    return ConfigError(
        f"device: {ranks} ranks are more than the GPUs have room for: {name} finds none. {_there(gpus)}. Start fewer workers, with fewer "
        f"ranks{share}, or say device: cpu.",
        field="device",
    )


def _there(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "This host has no GPU that CUDA can use either"
    return "Here are " + ", ".join(f"{gpu.key}: {gpu.name} ({gpu.size / 2**30:.0f} GiB)" for gpu in gpus)


def _version(of: tuple[int, int]) -> str:
    return f"{of[0]}.{of[1]}"
