"""The kernels in Triton, in `gpu/`: for tensors on a GPU, where triton is installed. Without it torch computes, and a warning says so.

Importing this needs no triton. Each kernel compiles when it is first used and is kept in Triton's own cache on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

INTERPRETED = False
"""Whether they take tensors on the CPU, too: for tests, in Triton's interpreter."""
LARGEST_HEAD = 256
"""A head_dim above it does not fit the attention kernels' tiles."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class TritonKernels:
    """The launchers; arguments as in `gpu/`."""

    residual_norm: Kernel
    rotary_store: Kernel
    gated: Kernel
    attend_singles: Kernel
    attend_chunks: Kernel
    move_rows: Kernel
    draw: Kernel
    edges: Kernel


@cache
def triton_kernels() -> TritonKernels | None:
    """The kernels; None where triton is not installed, after a warning."""
    try:
        from .gpu.attend_chunks import attend_chunks
        from .gpu.attend_singles import attend_singles
        from .gpu.draw import draw
        from .gpu.edges import edges
        from .gpu.gated import gated
        from .gpu.move_rows import move_rows
        from .gpu.residual_norm import residual_norm
        from .gpu.rotary_store import rotary_store
    except ImportError as error:
        log.warning("No Triton kernels, the GPU computes with torch alone, some steps in five to ten times as many passes: %s", error)
        return None
    return TritonKernels(residual_norm, rotary_store, gated, attend_singles, attend_chunks, move_rows, draw, edges)


def triton_refusals() -> tuple[type[Exception], ...]:
    """What Triton says of a kernel that it cannot make for this GPU, as of a tile without room, which is no `RuntimeError`. Nothing where
    triton is not installed."""
    try:
        from triton import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def triton_on(device: torch.device) -> TritonKernels | None:
    """The kernels, if `device` is a GPU."""
    return triton_kernels() if device.type == "cuda" or INTERPRETED else None


def triton_for(x: Tensor) -> TritonKernels | None:
    """The kernels, if they can compute with `x`: bf16, fp16 or fp32, on a GPU."""
    return triton_kernels() if (x.is_cuda or INTERPRETED) and x.dtype in DTYPES else None


def attends(dtype: torch.dtype, head_dim: int, block_size: int, device: torch.device) -> bool:
    """Whether the attention kernels can compute over such a cache."""
    fits = dtype in DTYPES and head_dim <= LARGEST_HEAD and block_size.bit_count() == 1
    return fits and triton_on(device) is not None
