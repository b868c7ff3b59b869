"""From a Hugging Face checkpoint's tensors to ours: which tensors make which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.model import Decoder

_LLAMA = {
    "embed": ("model.embed_tokens",),
    "head": ("lm_head",),
    "norm": ("model.norm",),
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "qk_norm": ("self_attn.q_norm", "self_attn.k_norm"),
    "o": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "layer": ("model.layers",),
}
_PHI3 = _LLAMA | {"qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
# Llama calls the norm before the MLP what Gemma calls the norm after attention.
_GEMMA = _LLAMA | {
    "attention_out_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp_out_norm": ("post_feedforward_layernorm",),
}
_OPT = _LLAMA | {
    "embed": ("model.decoder.embed_tokens",),
    "positions": ("model.decoder.embed_positions",),
    "norm": ("model.decoder.final_layer_norm",),
    "attention_norm": ("self_attn_layer_norm",),
    "o": ("self_attn.out_proj",),
    "mlp_norm": ("final_layer_norm",),
    "gate_up": ("fc1",),
    "down": ("fc2",),
    "layer": ("model.decoder.layers",),
}
_NAMES = {"phi3": _PHI3, "gemma2": _GEMMA, "gemma3_text": _GEMMA, "opt": _OPT}
"""Per family, by our tensors' names (see weights.py): the modules whose weights, or biases, make one, in order."""

_OPT_UNUSED_POSITIONS = 2


def source_names(name: str, decoder: Decoder) -> list[str]:
    """The checkpoint's tensors that make the prepared tensor `name`, in order; with a layer norm, weight then bias."""
    layer, _, part = name.rpartition(".")
    names = _NAMES.get(decoder.family, _LLAMA)
    inside = f"{names['layer'][0]}.{layer}." if layer else ""
    kinds = ["bias"] if part.endswith("_bias") else ["weight"]
    if decoder.layer_norm and part.endswith("norm"):
        kinds = ["weight", "bias"]
    return [f"{inside}{module}.{kind}" for module in names[part.removesuffix("_bias")] for kind in kinds]


def check_names(names: Iterable[str], decoder: Decoder, wanted: Iterable[str]) -> None:
    """Raise `ModelError` for the first tensor that is missing, or that none of the prepared tensors `wanted` would read."""
    ignored = re.compile(r".*rotary_emb\.inv_freq$" + (r"|lm_head\.weight$" if decoder.tied_head else ""))
    have, want = set(names), {source for name in wanted for source in source_names(name, decoder)}
    if missing := sorted(want - have):
        raise ModelError(f"The checkpoint lacks {missing[0]}" + (f" and {len(missing) - 1} more tensors." if missing[1:] else "."))
    if extra := sorted(name for name in have - want if not ignored.match(name)):
        raise ModelError(f"The checkpoint has tensors this model does not use: {', '.join(extra[:3])}{' …' if extra[3:] else ''}")


def make_tensor(name: str, decoder: Decoder, read: Callable[[str], Tensor]) -> Tensor:
    """The prepared tensor `name` (see weights.py) from the checkpoint's tensors, which `read` returns by name, unfused."""
    tensors = [read(source) for source in source_names(name, decoder)]
    part = name.rpartition(".")[2]
    if part == "positions":
        return tensors[0][_OPT_UNUSED_POSITIONS:]
    if not part.endswith("norm"):
        return torch.cat(tensors) if tensors[1:] else tensors[0]
    # Gemma scales its norms by 1 + weight.
    norms = [tensor.float() + (1.0 if decoder.family in ("gemma2", "gemma3_text") else 0.0) for tensor in tensors]
    if part == "qk_norm":
        return torch.cat([norm.expand(count, -1) for norm, count in zip(norms, (decoder.heads, decoder.kv_heads), strict=True)])
    return torch.stack(norms) if decoder.layer_norm else norms[0]
