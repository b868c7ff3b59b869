"""From a Hugging Face config to the decoder's description: what each family adds to the common one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import ModelError
from ..core.model import Decoder, Rope
from ..kernels.gated import UNGATED
from .rope import frequencies

Config = Mapping[str, Any]

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu"}
# (key, the only value we can serve): anything else would be served wrongly, so it is refused.
UNSUPPORTED = {"use_bidirectional_attention": False, "quantization_config": None}
_UNSUPPORTED_OPT = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True}


def describe(config: Config) -> Decoder:
    """The decoder a Hugging Face text config (complete, defaults filled in) of a family of `FAMILIES` describes; `ModelError` names
    what we cannot serve."""
    refuse(config, UNSUPPORTED)
    decoder = Decoder(**_common(config) | FAMILIES[config["model_type"]](config))
    _check(decoder)
    return decoder


def refuse(config: Config, only: Mapping[str, object]) -> None:
    """Raise `ModelError` for a setting of the config that is there and not what `only` says."""
    for key, value in only.items():
        if config.get(key) not in (value, None):
            raise ModelError(f"The model's {key} is {config[key]!r}; that is not supported.", field=key)


def _common(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "family": config["model_type"],
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "query_scale": head_dim**-0.5,
        "tied_head": config["tie_word_embeddings"],
        "windows": _windows(config),
    }


def _windows(config: Config) -> tuple[int, ...]:
    """Per layer by its type; a model without layer types has its window, if any, in all layers."""
    window = config.get("sliding_window") or 0
    kinds = {"full_attention": 0, "sliding_attention": window}
    try:
        return tuple(kinds[kind] for kind in config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"])
    except KeyError as error:
        raise ModelError(f"Layers of type {error} are not supported.", field="layer_types") from None


def _rotary(config: Config) -> dict[str, Any]:
    """What all families but OPT have: RMS norms, a gated MLP, rotary embedding."""
    return {
        "intermediate": config["intermediate_size"],
        "activation": _activation(config, "hidden_activation" if "hidden_activation" in config else "hidden_act"),
        "norm_eps": config["rms_norm_eps"],
        "biases": (("qkv", "o") if config.get("attention_bias") else ()) + (("gate_up", "down") if config.get("mlp_bias") else ()),
        "rope_full": _rope(config["rope_parameters"].get("full_attention", config["rope_parameters"])),
    }


def _qwen2(config: Config) -> dict[str, Any]:
    return _rotary(config) | {"biases": ("qkv",)}


def _qwen3(config: Config) -> dict[str, Any]:
    return _rotary(config) | {"qk_norm": True}


def _gemma2(config: Config) -> dict[str, Any]:
    return _rotary(config) | {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "query_scale": config["query_pre_attn_scalar"] ** -0.5,
        "sandwich_norms": True,
        "attention_softcap": config.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": config.get("final_logit_softcapping") or 0.0,
    }


def _gemma3(config: Config) -> dict[str, Any]:
    return _gemma2(config) | {"qk_norm": True, "rope_window": _rope(config["rope_parameters"]["sliding_attention"])}


def _opt(config: Config) -> dict[str, Any]:
    """Not OPT-350m, which norms after its layers and projects its embeddings."""
    refuse(config, _UNSUPPORTED_OPT | {"word_embed_proj_dim": config["hidden_size"]})
    return {
        "intermediate": config["ffn_dim"],
        "activation": _activation(config, "activation_function"),
        "norm_eps": 1e-5,
        "layer_norm": True,
        "biases": ("qkv", "o", "gate_up", "down") if config["enable_bias"] else (),
        "learned_positions": config["max_position_embeddings"],
        "rope_full": None,
    }


FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _rotary,
    "mistral": _rotary,
    "phi3": _rotary,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "opt": _opt,
}


def _activation(config: Config, key: str) -> str:
    activation = _ACTIVATIONS.get(config[key])
    if activation is None or (activation in UNGATED) != (config["model_type"] == "opt"):
        raise ModelError(f"Activation {config[key]!r} is not supported in {config['model_type']} models.", field=key)
    return activation


def _rope(parameters: Mapping[str, Any]) -> Rope:
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta" and value is not None}
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("Rotary embedding of a part of the head is not supported.", field="partial_rotary_factor")
    return Rope(theta=parameters["rope_theta"], scaling={} if scaling.get("rope_type", "default") == "default" else scaling)


def _check(decoder: Decoder) -> None:
    """Ask for the frequencies now, so that an unknown rope type is refused when the model is prepared."""
    for rope in (decoder.rope_full, decoder.rope_window):
        if rope is not None:
            frequencies(rope, decoder.head_dim)
    if decoder.heads % decoder.kv_heads:
        raise ModelError(f"{decoder.heads} heads cannot share {decoder.kv_heads} KV heads.", field="num_key_value_heads")
