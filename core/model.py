"""The card of a prepared model: what every process may know of a model without reading a weight.

A prepared model is a directory:

    card.json            this card
    weights.safetensors  tensors in the layout the kernels read, memory-mapped by every worker of a host
    tokenizer.json       Hugging Face tokenizers format
    chat_template.jinja  only if the source has one
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .errors import ConfigError, ModelError
from .layout import CacheGroup, CacheKind, DType, Layout, even_stages, splits
from .quantization import GROUP, Quantization, precision

CARD, WEIGHTS, TOKENIZER, CHAT_TEMPLATE = "card.json", "weights.safetensors", "tokenizer.json", "chat_template.jinja"


class Rope(BaseModel):
    """Rotary embedding of one kind of layer. `theta`: base; `scaling`: the Hugging Face rope parameters, as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    theta: float
    scaling: dict[str, float | str | list[float]] = {}


class Decoder(BaseModel):
    """One decoder, described: everything the engine needs to know to run the family's arithmetic.

    `windows[i]` is layer i's attention window, 0 for full attention. `embedding_scale` multiplies the embedded tokens.
    `query_scale` multiplies q before the dot product.
    `biases`: which of the products "qkv", "o", "gate_up", "down" add one. `layer_norm`: layer norms with a bias, not RMS norms.
    `learned_positions`: how many positions have a learned embedding, added to the tokens'; 0 with rotary embedding. `rope_full` None: no
    rotary embedding. `attention_softcap`, `logit_softcap`: x becomes cap * tanh(x / cap); 0 is no cap.
    `sandwich_norms`: norms after attention and MLP as well as before. `qk_norm`: RMS norm of each head of q and k.
    A family that scales its norms by 1 + weight has the 1 added to the prepared weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str
    norm_eps: float
    embedding_scale: float = 1.0
    query_scale: float
    qk_norm: bool = False
    sandwich_norms: bool = False
    layer_norm: bool = False
    biases: tuple[str, ...] = ()
    learned_positions: int = 0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied_head: bool
    windows: tuple[int, ...]
    rope_full: Rope | None
    rope_window: Rope | None = None

    def can_split(self, tp: int) -> bool:
        """Whether `tp` ranks can share out the attention heads, the KV heads (or these to several ranks each) and the MLP evenly."""
        return tp > 0 and self.heads % tp == 0 and self.intermediate % tp == 0 and splits(self.kv_heads, tp)


class ForeignDecoder(BaseModel):
    """A decoder none of our families describes: transformers computes it, over our cache. `windows` as in `Decoder`.

    `architecture`: transformers' class. `config`: its whole Hugging Face config. `heads`, `kv_heads` and `head_dim` are what its
    layers hand to their attention.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    family: str
    architecture: str
    config: dict[str, Any]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]


class ModelCard(BaseModel):
    """`fingerprint`: SHA-256 (hex) over decoder, dtype, quantization and weights. `dtype`: what is computed with. `bos_token_id` is
    prepended by the tokenizer, not by us."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    source: str
    fingerprint: str
    dtype: DType
    quantization: Quantization = Quantization.NONE
    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    weights_bytes: int
    decoder: Decoder | ForeignDecoder

    @property
    def precision(self) -> str:
        """Dtype and quantization, in words."""
        return precision(self.dtype, self.quantization)

    def matrix_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a layer's product."""
        return self.quantization.matrix_bytes(outputs, inputs, self.dtype.itemsize)

    def table_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of an embedding or a head."""
        return self.quantization.of_tables.matrix_bytes(outputs, inputs, self.dtype.itemsize)

    @property
    def slow_path(self) -> str | None:
        """What to say at start of a model that transformers computes; None for one that we compute."""
        if isinstance(self.decoder, Decoder):
            return None
        return f"{self.name} ({self.decoder.architecture}) has no fast path here: it runs through transformers, slower."

    def cache_groups(self, kv_dtype: DType | None = None) -> tuple[CacheGroup, ...]:
        """One group per distinct window, full attention first; of the weights' dtype if no other is named."""
        decoder = self.decoder
        return tuple(
            CacheGroup(
                kind=CacheKind.WINDOW if window else CacheKind.FULL,
                layers=tuple(i for i, w in enumerate(decoder.windows) if w == window),
                kv_heads=decoder.kv_heads,
                head_dim=decoder.head_dim,
                dtype=kv_dtype or self.dtype,
                window=window,
            )
            for window in sorted(set(decoder.windows))
        )

    def layout(
        self, *, block_size: int, kv_tokens: int, tp: int = 1, stages: tuple[int, ...] = (), kv_dtype: DType | None = None
    ) -> Layout:
        """A worker's layout whose every group holds `kv_tokens` tokens, rounded up to whole blocks. `ConfigError` (field `tp` or `pp`)
        if the model cannot be spread like that; `stages` as in `Layout`, `kv_dtype` as in `cache_groups`."""
        decoder = self.decoder
        if isinstance(decoder, ForeignDecoder):
            if tp > 1 or stages:
                raise ConfigError(f"{self.slow_path} So it cannot be spread over ranks.", field="tp" if tp > 1 else "pp")
        elif not decoder.can_split(tp):
            works = min((count for count in range(1, decoder.heads + 1) if decoder.can_split(count)), key=lambda count: abs(count - tp))
            what = f"{decoder.heads} attention heads, {decoder.kv_heads} KV heads and an MLP of {decoder.intermediate}"
            raise ConfigError(f"tp {tp} does not split {self.name}, which has {what}; the nearest that does is {works}.", field="tp")
        elif not all(self.quantization.can_cut(inputs // tp) for inputs in (decoder.heads * decoder.head_dim, decoder.intermediate)):
            raise ConfigError(
                f"tp {tp} does not split {self.name} with quantization {self.quantization}: what closes a layer has "
                f"{decoder.heads * decoder.head_dim} and {decoder.intermediate} inputs, {GROUP} of which share a scale. int8 would.",
                field="tp",
            )
        if stages and (len(stages) > decoder.layers or min(stages) < 1 or sum(stages) != decoder.layers):
            nearest = even_stages(decoder.layers, min(len(stages), decoder.layers))
            raise ConfigError(
                f"Stages of {stages} layers do not share out the {decoder.layers} layers of {self.name}; {nearest} would.", field="pp"
            )
        groups = self.cache_groups(kv_dtype)
        blocks = -(-kv_tokens // block_size)
        return Layout(self.fingerprint, groups, block_size, (blocks,) * len(groups), tp, stages)


def read_card(directory: Path) -> ModelCard:
    """The card of the prepared model in `directory`; `ModelError` says what is wrong with it."""
    path = directory / CARD
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{directory} is not a prepared model: it has no {CARD}. Make one with `diptych prepare`.") from None
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
