"""What benchmarks on a GPU have in common: that there is one, what it is, how fast it copies and multiplies, how long a call takes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes."""


def need_gpu() -> torch.device:
    """The GPU that is measured. The process ends where there is none."""
    if not torch.cuda.is_available():
        sys.exit("no GPU: not measured (torch finds no CUDA device here)")
    return torch.device("cuda", torch.cuda.current_device())


def described(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=30).stdout.split()[0]
    memory = round(found.total_memory / 2**30, 1)
    return {
        "name": found.name,
        "memory_gib": memory,
        "cores": found.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }


def device_clock(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, quantiles=[0.5]))


def copy_rate(size: int, device: torch.device, clock: Clock) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * size / clock(lambda: target.copy_(source))


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """Operations per second of one large product of random numbers."""
    left, right = torch.randn(2, size, size, dtype=dtype, device=device)
    return 2e3 * size**3 / clock(lambda: left @ right)
