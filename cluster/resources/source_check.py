"""Whether a model that is not prepared yet can be spread as the config says: asked of its few sizes, before minutes go into converting it.

What a source does not tell here (a hub's model that is not downloaded, a family that no size is known of) is asked of the prepared model.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.config import ClusterConfig
from ...core.layout import DType
from ...core.model import Decoder, ForeignDecoder, ModelCard
from ...core.quantization import Quantization
from ...engine.gguf import read_first
from ...engine.location import DEMO_PACKAGE, source_name
from .layouts import layouts

FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt"})
"""Those of `engine.families`, which takes a second to import."""
_GGUF_FAMILIES = {"gemma3": "gemma3_text"}
_GGUF_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
}


def check_spread(config: ClusterConfig, source: str) -> None:
    """Raise `ConfigError`, as for the prepared model, if what `source` says of itself cannot be spread over ranks as the config wants."""
    sizes = _sizes(source)
    if (card := sketch(config.model.name or source_name(source), sizes, config.model.quantization)) is not None:
        layouts(config, card)


def sketch(name: str, sizes: Mapping[str, Any], quantization: Quantization = Quantization.NONE) -> ModelCard | None:
    """A card with the sizes of a Hugging Face config and nothing else that is true; None if it lacks one."""
    try:
        decoder = _decoder(sizes)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return ModelCard(
        name=name, source="", fingerprint="", dtype=DType.FLOAT32, vocab_size=1, max_context=1, bos_token_id=None, eos_token_ids=(),
        has_chat_template=False, weights_bytes=0, decoder=decoder, quantization=quantization,
    )  # fmt: skip


def _decoder(sizes: Mapping[str, Any]) -> Decoder | ForeignDecoder:
    family, layers, heads = sizes["model_type"], sizes["num_hidden_layers"], sizes["num_attention_heads"]
    shape: dict[str, Any] = {
        "family": family,
        "layers": layers,
        "heads": heads,
        "kv_heads": sizes.get("num_key_value_heads") or heads,
        "head_dim": sizes.get("head_dim") or sizes["hidden_size"] // heads,
    }
    if min(layers, heads, shape["kv_heads"], shape["head_dim"]) < 1:
        raise ValueError("no sizes of a model")
    shape["windows"] = (0,) * layers
    if family not in FAMILIES:
        return ForeignDecoder(**shape, architecture=(sizes.get("architectures") or [family])[0], config={})
    inner = sizes["ffn_dim" if family == "opt" else "intermediate_size"]
    rest: dict[str, Any] = {"hidden": sizes["hidden_size"], "intermediate": inner, "activation": "", "norm_eps": 0.0, "query_scale": 1.0}
    return Decoder(**shape, **rest, tied_head=True, rope_full=None)


def _sizes(source: str) -> Mapping[str, Any]:
    """Of a source as a Hugging Face config names them; empty if it does not tell."""
    path = Path(source)
    if source == f"package:{DEMO_PACKAGE}":
        return _gguf_sizes(importlib.import_module(DEMO_PACKAGE).chunk_paths()[0])
    if path.is_file() and path.suffix == ".gguf":
        return _gguf_sizes(path)
    try:
        found = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):  # what is wrong with it is said when it is prepared
        return {}
    return found if isinstance(found, dict) else {}


def _gguf_sizes(path: Path) -> Mapping[str, Any]:
    said = read_first(path)
    family = str(said.get("general.architecture"))
    sizes = {key: said[f"{family}.{theirs}"] for key, theirs in _GGUF_SIZES.items() if f"{family}.{theirs}" in said}
    return {"model_type": _GGUF_FAMILIES.get(family, family), **sizes}
