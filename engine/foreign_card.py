"""What the slow path must know of a model before it serves it: which class computes it, and what its layers ask of attention.

Nothing is believed of a model that can be asked of it: the module is run once over a few tokens with an attention that notes what
it is called with and a mask that notes which keys it lets a query see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.model import ForeignDecoder
from .families import FAMILIES, UNSUPPORTED, refuse
from .foreign import causal_class, config_of, use_attention
from .sources import UNREADABLE

_PROBE, _PROBE_TOKENS = "diptych-probe", 5
_ATTENTIONS = ("full_attention", "sliding_attention")
_CHANGING_ROPES = ("longrope",)
"""Rotary embeddings that turn all positions otherwise once a sequence is long: cached keys would be wrong, and so would neighbours'."""
_OURS = {"scaling", "softcap"}
# Said in passing, and in what is stored or computed already: positions are in the keys, the window is in the mask.
_IDLE = {
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "sliding_window",
    "dropout",
}
_NAMELESS = {"_name_or_path", "transformers_version", "dtype", "quantization_config"}
"""Settings that say where a model came from, not what it is."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands in for a mask: which keys a query sees. `window` 0: all before it."""

    window: int


@dataclass(frozen=True, slots=True)
class _Call:
    """One layer's call of attention."""

    layer: int
    shape: tuple[int, int, int]
    window: int


@dataclass(frozen=True, slots=True)
class _Probe:
    family: str
    calls: list[_Call] = field(default_factory=list)


def foreign_class(config: Mapping[str, Any]) -> tuple[Any, str]:
    """transformers' config object of a complete Hugging Face config, and the name of the class that computes it.

    `ModelError` says why the slow path cannot serve models of this kind, as far as that shows without the weights.
    """
    found, family = config_of({key: value for key, value in config.items() if key not in _NAMELESS}), config["model_type"]
    refuse(config, UNSUPPORTED)
    refuse(config, {"is_encoder_decoder": False})
    if found.sub_configs:
        raise _unsupported(family, f"it is made of several models ({', '.join(sorted(found.sub_configs))})")
    for kind in config.get("layer_types") or ():
        if kind not in _ATTENTIONS:
            raise _unsupported(family, f"it has layers of type {kind}, which is neither full nor sliding attention", "layer_types")
    for rope in _rope_types(config):
        if rope in _CHANGING_ROPES:
            raise _unsupported(family, f"its rotary embedding of type {rope} changes with the length of the sequence", "rope_type")
    try:
        architecture = causal_class(found)
    except KeyError:
        raise _unsupported(family, "transformers has no causal language model of that type") from None
    if architecture._is_stateful:
        raise _unsupported(family, "it keeps a state that is not a KV cache")
    return found, str(architecture.__name__)


def describe_foreign(module: Any, config: Any, architecture: str) -> ForeignDecoder:
    """What the slow path needs to serve `module`, or a `ModelError` that says why it cannot."""
    calls = _ask(module, config)
    layers = [call.layer for call in calls]
    if not calls:
        raise _unsupported(config.model_type, "its attention does not go through transformers' attention interface")
    if missing := sorted(set(range(config.num_hidden_layers)) - set(layers)):
        raise _unsupported(config.model_type, f"{len(missing)} of its layers, the first is {missing[0]}, have no such attention")
    if layers != list(range(config.num_hidden_layers)):
        raise _unsupported(config.model_type, f"its layers call attention in the order {layers}")
    shapes = {call.shape for call in calls}
    if len(shapes) > 1:
        raise _unsupported(config.model_type, "its layers differ in heads, KV heads and head size: " + ", ".join(map(str, sorted(shapes))))
    heads, kv_heads, head_dim = shapes.pop()
    settings = json.loads(config.to_json_string(use_diff=False))
    return ForeignDecoder(
        family=config.model_type,
        architecture=architecture,
        config={key: value for key, value in settings.items() if key not in _NAMELESS},
        layers=len(layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=tuple(call.window for call in calls),
    )


def _unsupported(family: str, why: str, name: str = "model_type") -> ModelError:
    return ModelError(
        f"Models of type {family!r} have no fast path ({', '.join(FAMILIES)} have), and this one cannot run through transformers: {why}.",
        field=name,
    )


def _rope_types(settings: Mapping[str, Any]) -> Iterable[str]:
    """All `rope_type`s anywhere in a config."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif key in ("rope_type", "type") and isinstance(value, str):
            yield value


@torch.inference_mode()
def _ask(module: Any, config: Any) -> list[_Call]:
    """Run a few tokens through the module; its layers' calls of attention, in order."""
    from transformers import AttentionMaskInterface

    context = config.max_position_embeddings

    def mask(*, mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], **_others: object) -> _Mask:
        return _Mask(_window(mask_function, context, config.model_type))

    AttentionMaskInterface.register(_PROBE, mask)
    probe, ids = _Probe(config.model_type), torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    try:
        use_attention(module, _PROBE, _note, probe)
        module(input_ids=ids, position_ids=torch.arange(_PROBE_TOKENS)[None], use_cache=False)
    except UNREADABLE as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise _unsupported(config.model_type, f"it fails with another attention than its own ({why})") from error
    return probe.calls


def _window(sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], context: int, family: str) -> int:
    """How many keys up to its own a query sees at most, 0 for all; `ModelError` if it sees others. Asked at the ends of the context and
    of the window, where a window begins to differ from what it is not."""
    zero, keys = torch.tensor(0), torch.arange(context)
    window = int(sees(zero, zero, keys[-1], keys).sum())
    for query in {0, 1, window - 1, window, window + 1, 2 * window + 1, context // 2, context - 1}:
        if query < context and not torch.equal(sees(zero, zero, keys[query], keys), (keys <= query) & (keys > query - window)):
            raise _unsupported(family, "its attention mask is neither causal nor a sliding window")
    return window if window < context else 0


def _note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, **arguments: Any) -> Any:
    """An attention that computes nothing; `ModelError` names what ours could not honour."""
    probe: _Probe = module.paged
    family = probe.family
    asked = {name for name, given in arguments.items() if name not in _OURS | _IDLE and given is not None and given is not False}
    if asked:
        raise _unsupported(family, f"its attention asks for {', '.join(sorted(asked))}")
    if arguments.get("dropout"):
        raise _unsupported(family, "its attention drops values at random")
    if not isinstance(mask, _Mask):
        raise _unsupported(family, "it makes its attention mask itself")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[2] != key.shape[2]:
        raise _unsupported(family, f"its queries, keys and values are of sizes {query.shape[-1]}, {key.shape[-1]} and {value.shape[-1]}")
    probe.calls.append(_Call(module.layer_idx, (query.shape[1], key.shape[1], key.shape[3]), mask.window))
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None
