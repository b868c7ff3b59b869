"""CUDA graphs for a decode worker's steps: whether it can have them, what memory they take, and making them. Not run on a GPU yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ...core.fleet import Phase
from ...core.layout import Layout
from ...core.model import ModelCard
from ...engine.cuda_capture import CudaCapture, untold_bytes
from ...engine.decode_shapes import DecodeShape, decode_shapes
from ...engine.engine import Engine
from ...engine.weights import TORCH_DTYPE
from ...kernels.triton_kernels import attends
from ..process.child import progress
from ..process.spec import RankSpec

REHEARSED = 4
MOST_GRAPH_BYTES = 64 << 20
"""Of a graph, beside what torch counts. Not measured by us: an allowance, for a GPU on which another process takes memory all the while."""

log = logging.getLogger(__name__)


def shapes_of(spec: RankSpec, card: ModelCard, layout: Layout, device: torch.device) -> tuple[DecodeShape, ...]:
    """What is to be captured; nothing on a CPU, of a prefill worker, or where it cannot be, which is logged."""
    if device.type != "cuda" or spec.phase is Phase.PREFILL:
        return ()
    if (why := hindrance(spec, card, layout, device)) is not None:
        _say_eager(why)
        return ()
    return decode_shapes(spec.max_running, card.max_context)


def hindrance(spec: RankSpec, card: ModelCard, layout: Layout, device: torch.device) -> str | None:
    """Why decode steps on `device` are not captured; None if they are."""
    if not spec.cuda_graphs:
        return "cuda_graphs is false"
    if card.slow_path:
        return f"transformers computes {card.name}"
    if layout.ranks > 1:
        return f"the worker has {layout.ranks} ranks"
    if not all(attends(TORCH_DTYPE[card.dtype], group.head_dim, layout.block_size, device) for group in layout.groups):
        return "attention is not computed by Triton's kernels"
    return None


def rehearse(engine: Engine, shapes: tuple[DecodeShape, ...], device: torch.device) -> tuple[tuple[DecodeShape, ...], int]:
    """Capture the largest few of `shapes`, before the pool is sized, over the small one. What can be captured, nothing if that failed,
    which is logged; and the bytes of the GPU it will take that torch does not count. What torch does count it has held once."""
    if not shapes:
        return (), 0
    taken = [untold_bytes(device)]
    if not capture(engine, shapes[:REHEARSED], device, lambda: taken.append(untold_bytes(device))):
        return (), 0
    return shapes, _bytes_of_one(taken) * len(shapes)


def capture(engine: Engine, shapes: tuple[DecodeShape, ...], device: torch.device, captured: Callable[[], None] = lambda: None) -> bool:
    """Over the caches that the engine holds; `captured` is called after each. False if there is nothing to capture, or if that failed,
    which is logged."""
    if not shapes:
        return False

    def told(count: int) -> None:
        progress(f"decode steps captured: {count} of {len(shapes)}")
        captured()

    try:
        engine.capture(shapes, CudaCapture(device), told)
    except RuntimeError as error:
        _say_eager(f"capturing failed: {error}")
        return False
    return True


def _bytes_of_one(taken: Sequence[int]) -> int:
    """What a graph takes. `taken`: of the GPU, by anyone, before the first and after each. The first pays for what comes but once (modules,
    cuBLAS), and whoever shares the GPU may be loading its weights meanwhile: so it is the least that a later one took."""
    later = [after - before for before, after in pairwise(taken[1:])]
    return max(0, min([MOST_GRAPH_BYTES, *later]))


def _say_eager(why: str) -> None:
    log.warning("Decode steps run without CUDA graphs, each kernel launched by itself: %s.", why)
