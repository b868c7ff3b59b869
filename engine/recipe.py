"""How a checkpoint becomes a prepared model: on the fast path as one of our families, on the slow path as transformers loads it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..core.errors import ModelError
from ..core.layout import DType
from ..core.model import Decoder, ForeignDecoder, ModelCard
from .checkpoint import check_names, make_tensor
from .families import FAMILIES, describe
from .foreign import load_module
from .foreign_card import describe_foreign, foreign_class
from .foreign_check import check_same
from .sources import Checkpoint
from .weights import TORCH_DTYPE, Shapes, shapes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to write: the tensors `shapes`, each of which `make` returns by name. `check`, if there is one, raises `ModelError` if what
    was written and opened again is not what the checkpoint was."""

    decoder: Decoder | ForeignDecoder
    max_context: int
    shapes: Shapes
    make: Callable[[str], Tensor]
    check: Callable[[ModelCard, Mapping[str, Tensor]], None] | None = None


def choose_recipe(checkpoint: Checkpoint, dtype: DType, report: Callable[[str, float], None]) -> Recipe:
    """The recipe for a checkpoint; `ModelError` names what we cannot serve. `report`: what is being done, the share of it done.

    A model of one of our families with a setting that the fast path lacks takes the slow one.
    """
    if checkpoint.config["model_type"] not in FAMILIES:
        return _foreign(checkpoint, dtype, report)
    try:
        decoder = describe(checkpoint.config)
    except ModelError as lacking:
        log.info("No fast path: %s", lacking.message)
        return _foreign(checkpoint, dtype, report)
    return _ours(checkpoint, decoder, dtype)


def _ours(checkpoint: Checkpoint, decoder: Decoder, dtype: DType) -> Recipe:
    shapes = shapes_of(decoder, int(checkpoint.config["vocab_size"]), dtype)
    check_names(checkpoint.names, decoder, shapes)
    make = partial(make_tensor, decoder=decoder, read=checkpoint.read)
    return Recipe(decoder, checkpoint.config["max_position_embeddings"], shapes, make)


def _foreign(checkpoint: Checkpoint, dtype: DType, report: Callable[[str, float], None]) -> Recipe:
    config, architecture = foreign_class(checkpoint.config)
    report("loading with transformers", 0.0)
    tensors = {name: checkpoint.read(name) for name in sorted(checkpoint.names)}
    module = load_module(config, tensors, TORCH_DTYPE[dtype])
    decoder = describe_foreign(module, config, architecture)
    own = _each_once(module.state_dict())
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    return Recipe(decoder, config.max_position_embeddings, shapes, own.__getitem__, partial(check_same, reference=module))


def _each_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the later names of tied tensors: transformers ties them again."""
    seen: set[tuple[int, int]] = set()
    kept = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(f"Tensor {name} is {tensor.dtype}; that is not supported.")
        place = (tensor.data_ptr(), tensor.numel())
        if place not in seen:
            seen.add(place)
            kept[name] = tensor
    return kept
