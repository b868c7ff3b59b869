"""Decoders of two small layers, for tests that make their weights up: of the plainest family, and of one with most of what there is."""

from __future__ import annotations

from diptych.core.layout import DType
from diptych.core.model import Decoder, ModelCard, Rope

LLAMA = Decoder(
    family="llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, activation="silu", norm_eps=1e-6,
    query_scale=0.25, tied_head=False, windows=(0, 0), rope_full=Rope(theta=1e4),
)  # fmt: skip
GEMMA = LLAMA.model_copy(
    update={
        "activation": "gelu_tanh", "embedding_scale": 8.0, "qk_norm": True, "sandwich_norms": True, "attention_softcap": 50.0,
        "logit_softcap": 30.0, "tied_head": True, "windows": (24, 0), "rope_window": Rope(theta=1e3),
    }
)  # fmt: skip


def card(decoder: Decoder, dtype: DType, vocabulary: int) -> ModelCard:
    """Of a model that is nowhere, with a context of 128 tokens."""
    return ModelCard(
        name="tiny", source="", fingerprint="", dtype=dtype, vocab_size=vocabulary, max_context=128, bos_token_id=None, eos_token_ids=(),
        has_chat_template=False, weights_bytes=0, decoder=decoder,
    )  # fmt: skip
