"""Quantising a model while it is prepared."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from ..core.errors import ModelError
from ..core.model import Decoder
from ..core.quantization import Quantization
from ..kernels.quantized import Quantized, quantize
from .recipe import Recipe
from .weights import SCALES, is_product, kind_of, quantized_shapes


def quantizing(recipe: Recipe, quantization: Quantization) -> Recipe:
    """The recipe for the same model with its products quantised. `ModelError` if it is one that transformers computes, or if a product
    cannot be."""
    if quantization is Quantization.NONE:
        return recipe
    if not isinstance(recipe.decoder, Decoder):
        raise ModelError(
            f"{recipe.decoder.architecture} runs through transformers, which takes no {quantization} weights: leave quantization out.",
            field="quantization",
        )

    @lru_cache(maxsize=1)  # numbers and scales are asked for one after the other
    def both(name: str) -> Quantized:
        return quantize(recipe.make(name), kind_of(name, quantization).bits)

    def make(name: str) -> Tensor:
        if name.endswith(SCALES):
            return both(name.removesuffix(SCALES)).scales
        return both(name).values if is_product(name) else recipe.make(name)

    return replace(recipe, shapes=quantized_shapes(recipe.shapes, quantization), make=make)
