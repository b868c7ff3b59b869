"""CUDA graphs for a decode worker's steps: whether it can have them, what memory they take, and making them. Not run on a GPU yet."""

from __future__ import annotations

import logging

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
    """Capture the largest of `shapes`, before the pool is sized, over the small one. What can be captured, nothing if that failed, which is
    logged; and the bytes of the GPU it will take that torch does not count. What torch does count it has held once."""
    if not shapes:
        return (), 0
    before = untold_bytes(device)
    if not capture(engine, shapes[:1], device):
        return (), 0
    return shapes, max(0, untold_bytes(device) - before) * len(shapes)


def capture(engine: Engine, shapes: tuple[DecodeShape, ...], device: torch.device) -> bool:
    """Over the caches that the engine holds. False if there is nothing to capture, or if that failed, which is logged."""
    if not shapes:
        return False
    try:
        engine.capture(shapes, CudaCapture(device), lambda count: progress(f"decode steps captured: {count} of {len(shapes)}"))
    except RuntimeError as error:
        _say_eager(f"capturing failed: {error}")
        return False
    return True


def _say_eager(why: str) -> None:
    log.warning("Decode steps run without CUDA graphs, each kernel launched by itself: %s.", why)
