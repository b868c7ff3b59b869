"""The slow path: a decoder that transformers computes, over our paged cache.

The module is transformers' own. Only its attention is ours: transformers' attention interface hands every layer's queries, keys
and values to `_attention`, which stores the keys and values in the layer's cache group and attends over the cache. The tokens of
all rows go through the module as one sequence, each with its position; attention alone knows which row a token is of.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.model import ForeignDecoder, ModelCard
from ..kernels.kv_store import store_kv
from ..kernels.paged_attention import attend
from .inputs import Inputs
from .weights import TORCH_DTYPE

ATTENTION = "diptych"
"""The name of our attention in transformers' attention interface. No mask is registered under it, so transformers makes none."""


class TransformersDecoder:
    """As `LoadedDecoder`, with transformers' module. Holds nothing between steps but weights and caches."""

    def __init__(self, card: ModelCard, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """`hold` it some caches before a step. `ModelError` if the tensors are not the module's."""
        assert isinstance(card.decoder, ForeignDecoder)
        self._places = {layer: (g, i) for g, group in enumerate(card.cache_groups()) for i, layer in enumerate(group.layers)}
        self._groups = [self._places[layer][0] for layer in range(card.decoder.layers)]
        self._caches: list[Tensor] = []
        self._module = load_module(config_of(card.decoder.config), tensors, TORCH_DTYPE[card.dtype]).to(device)
        use_attention(self._module, ATTENTION, _attention, self)
        self._picks = "logits_to_keep" in inspect.signature(self._module.forward).parameters
        self._step: tuple[Inputs, Callable[[int], None] | None] | None = None

    def hold(self, caches: Sequence[Sequence[Tensor]]) -> None:
        """`caches[g][i]` is from now on the cache of layer `card.cache_groups()[g].layers[i]`."""
        self._caches = [caches[g][i] for _, (g, i) in sorted(self._places.items())]

    def logits(self, inputs: Inputs, on_layer: Callable[[int], None] | None) -> Tensor | None:
        """Compute the step; logits [drawing rows, vocab] in the model's dtype, None if nothing is drawn.

        `on_layer(layer)` is called right after a layer's KV is stored.
        """
        picked = {"logits_to_keep": inputs.drawn} if self._picks else {}
        self._step = (inputs, on_layer)
        output = self._module(input_ids=inputs.token_ids[None], position_ids=inputs.positions[None], use_cache=False, **picked)
        self._step = None
        if not len(inputs.drawn):
            return None
        logits: Tensor = output.logits[0]
        return logits if self._picks else logits.index_select(0, inputs.drawn)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
        """Store a layer's keys and values [tokens, kv_heads, head_dim], and attend; queries in and out [tokens, heads, head_dim]."""
        assert self._step is not None, "attention outside a step"
        inputs, on_layer = self._step
        group, cache = inputs.groups[self._groups[layer]], self._caches[layer]
        store_kv(cache, key, value, group.store)
        if on_layer:
            on_layer(layer)
        mixed = attend(query, cache, group.spans, query.shape[2] ** -0.5 if scaling is None else scaling, softcap or 0.0)
        return mixed.view(query.shape)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_others: object,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: query, key, value [1, heads, tokens, head_dim] to [1, tokens, heads, head_dim].

    The window is that of the layer's cache group. Which other arguments may come was looked at when the model was prepared.
    """
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return module.paged.attend(module.layer_idx, query, key, value, scaling, softcap)[None], None


def use_attention(module: Any, name: str, attention: Callable[..., Any], paged: object) -> None:
    """Have a module's layers call `attention`, and find `paged` as an attribute of the part of them that calls."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    for part in module.modules():
        if hasattr(part, "layer_idx"):
            part.paged = paged
    with silent():
        module.set_attn_implementation(name)


def config_of(config: Mapping[str, Any]) -> Any:
    """A complete Hugging Face config as transformers' own."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def causal_class(config: Any) -> Any:
    """transformers' causal language model for a config; `KeyError` if there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def load_module(config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' causal language model with these weights, which it takes as they are and where they lie, unless their dtype differs,
    and with transformers' plainest attention.

    `ModelError` names the tensors that are missing, too many, or of another shape.
    """
    with silent():
        module, found = causal_class(config).from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"The checkpoint lacks {missing[0]}" + (f" and {len(missing) - 1} more tensors." if missing[1:] else "."))
    if extra := sorted(found["unexpected_keys"]):
        raise ModelError(f"The checkpoint has tensors this model does not use: {', '.join(extra[:3])}{' …' if extra[3:] else ''}")
    for name, have, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(f"Tensor {name} has shape {tuple(have)}, not {tuple(wanted)}.")
    if wrong := found["error_msgs"]:
        raise ModelError(f"The checkpoint does not fit: {wrong[0]}")
    return module.eval()


@contextmanager
def silent() -> Iterator[None]:
    """Without transformers' bars and reports: what is wrong is said by us."""
    from transformers.utils import logging as theirs

    said: Any = theirs  # not all of it is typed
    level = said.get_verbosity()
    said.set_verbosity(logging.CRITICAL)
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        said.enable_progress_bar()
