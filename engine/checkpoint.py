"""From a Hugging Face checkpoint's config and tensors to ours: the decoder's description, and which tensors make which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.model import Decoder, Rope
from .rope import frequencies

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
# (key, the only value we can serve): anything else would be served wrongly, so it is refused.
_UNSUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}


def describe(config: Mapping[str, Any]) -> Decoder:
    """The decoder a Hugging Face text config (complete, defaults filled in) describes; `ModelError` names what we cannot serve."""
    family = config.get("model_type")
    for key, only in _UNSUPPORTED.items():
        if (value := config.get(key)) not in (only, None):
            raise ModelError(f"The model's {key} is {value!r}; that is not supported.", field=key)
    if family == "gemma3_text":
        return _checked(_gemma3(config))
    if family == "llama":
        return _checked(_llama(config))
    raise ModelError(f"Models of type {family!r} are not supported; gemma3_text and llama are.", field="model_type")


def _checked(decoder: Decoder) -> Decoder:
    """Ask for the frequencies now, so that an unknown rope type is refused when the model is prepared."""
    for rope in (decoder.rope_full, decoder.rope_window):
        if rope is not None:
            frequencies(rope, decoder.head_dim)
    if decoder.heads % decoder.kv_heads:
        raise ModelError(f"{decoder.heads} heads cannot share {decoder.kv_heads} KV heads.", field="num_key_value_heads")
    return decoder


def _gemma3(config: Mapping[str, Any]) -> Decoder:
    kinds = config["layer_types"]
    return Decoder(
        **_common(config, "hidden_activation"),
        embedding_scale=config["hidden_size"] ** 0.5,
        query_scale=config["query_pre_attn_scalar"] ** -0.5,
        qk_norm=True,
        sandwich_norms=True,
        windows=tuple(config["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds),
        rope_full=_rope(config["rope_parameters"]["full_attention"]),
        rope_window=_rope(config["rope_parameters"]["sliding_attention"]),
    )


def _llama(config: Mapping[str, Any]) -> Decoder:
    return Decoder(
        **_common(config, "hidden_act"),
        query_scale=config["head_dim"] ** -0.5,
        windows=(0,) * config["num_hidden_layers"],
        rope_full=_rope(config["rope_parameters"]),
    )


def _common(config: Mapping[str, Any], activation_key: str) -> dict[str, Any]:
    activation = _ACTIVATIONS.get(config[activation_key])
    if activation is None:
        raise ModelError(f"Activation {config[activation_key]!r} is not supported; {', '.join(_ACTIVATIONS)} are.", field=activation_key)
    return {
        "family": config["model_type"],
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "intermediate": config["intermediate_size"],
        "activation": activation,
        "norm_eps": config["rms_norm_eps"],
        "tied_head": config["tie_word_embeddings"],
    }


def _rope(parameters: Mapping[str, Any]) -> Rope:
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta" and value is not None}
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("Rotary embedding of a part of the head is not supported.", field="partial_rotary_factor")
    return Rope(theta=parameters["rope_theta"], scaling={} if scaling.get("rope_type", "default") == "default" else scaling)


def source_names(decoder: Decoder) -> set[str]:
    """The names of every tensor a checkpoint of this decoder has."""
    names = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if decoder.tied_head else {"lm_head.weight"})
    parts = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    parts += ["input_layernorm", "post_attention_layernorm"]
    if decoder.qk_norm:
        parts += ["self_attn.q_norm", "self_attn.k_norm"]
    if decoder.sandwich_norms:
        parts += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return names | {f"model.layers.{layer}.{part}.weight" for layer in range(decoder.layers) for part in parts}


def check_names(names: Iterable[str], decoder: Decoder) -> None:
    """Raise `ModelError` for the first tensor that is missing or that nothing would read."""
    ignored = re.compile(r".*rotary_emb\.inv_freq$" + (r"|lm_head\.weight$" if decoder.tied_head else ""))
    have, want = set(names), source_names(decoder)
    if missing := sorted(want - have):
        raise ModelError(f"The checkpoint lacks {missing[0]}" + (f" and {len(missing) - 1} more tensors." if missing[1:] else "."))
    if extra := sorted(name for name in have - want if not ignored.match(name)):
        raise ModelError(f"The checkpoint has tensors this model does not use: {', '.join(extra[:3])}{' …' if extra[3:] else ''}")


def make_tensor(name: str, decoder: Decoder, read: Callable[[str], Tensor]) -> Tensor:
    """The prepared tensor `name` (see weights.py) from the checkpoint's tensors, which `read` returns by name, unfused."""
    if name in ("embed", "head"):
        return read("model.embed_tokens.weight" if name == "embed" else "lm_head.weight")
    if name == "norm":
        return _norm(read("model.norm.weight"), decoder)
    layer, part = name.split(".")
    inside = f"model.layers.{layer}."

    def weight(path: str) -> Tensor:
        return read(f"{inside}{path}.weight")

    if part == "qkv":
        return torch.cat([weight(f"self_attn.{which}_proj") for which in "qkv"])
    if part == "gate_up":
        return torch.cat([weight("mlp.gate_proj"), weight("mlp.up_proj")])
    if part == "qk_norm":
        heads = ((weight("self_attn.q_norm"), decoder.heads), (weight("self_attn.k_norm"), decoder.kv_heads))
        return torch.cat([_norm(each, decoder).expand(count, -1) for each, count in heads])
    if part in ("o", "down"):
        return weight("self_attn.o_proj" if part == "o" else "mlp.down_proj")
    return _norm(weight(_norm_name(part, decoder)), decoder)


def _norm_name(part: str, decoder: Decoder) -> str:
    """Llama calls the norm before the MLP what Gemma calls the norm after attention."""
    return {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm" if decoder.sandwich_norms else "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }[part]


def _norm(weight: Tensor, decoder: Decoder) -> Tensor:
    """Gemma scales its norms by 1 + weight."""
    return weight.float() + 1.0 if decoder.family == "gemma3_text" else weight.float()
