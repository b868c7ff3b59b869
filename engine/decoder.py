"""The decoder: one arithmetic, described by the card, for every family we serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.model import Decoder, ModelCard
from ..kernels.gated import gated
from ..kernels.kv_store import store_kv
from ..kernels.layer_norm import layer_norm
from ..kernels.linear import linear
from ..kernels.paged_attention import attend
from ..kernels.rms_norm import rms_norm
from ..kernels.rotary import rotary_angles, rotate
from ..kernels.softcap import softcap_
from .inputs import GroupInputs, Inputs
from .rope import frequencies


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights (shapes in weights.py), its cache, and the index of its cache group."""

    attention_norm: Tensor
    qkv: Tensor
    qk_norm: Tensor | None
    o: Tensor
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    mlp_out_norm: Tensor | None
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    cache: Tensor
    group: int


class LoadedDecoder:
    """Weights and caches of one model. Stores the KV of the tokens it computes; holds nothing else between steps."""

    def __init__(self, card: ModelCard, tensors: Mapping[str, Tensor], caches: Sequence[Sequence[Tensor]]) -> None:
        """`caches[g][i]` is the cache of layer `card.cache_groups()[g].layers[i]`."""
        assert isinstance(card.decoder, Decoder)
        self.decoder = card.decoder
        groups = card.cache_groups()
        place = {layer: (g, caches[g][i]) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
        self.layers = [_layer(tensors, number, *place[number]) for number in range(self.decoder.layers)]
        ropes = [self.decoder.rope_window if group.window and self.decoder.rope_window else self.decoder.rope_full for group in groups]
        self.frequencies = [None if rope is None else frequencies(rope, self.decoder.head_dim) for rope in ropes]
        self.embed, self.norm = tensors["embed"], tensors["norm"]
        self.positions = tensors.get("positions")
        self.head = self.embed if self.decoder.tied_head else tensors["head"]
        # transformers rounds the scale to the model's dtype before multiplying; at bf16 and hidden 640 that is 25.25 for 25.298.
        self.embedding_scale = torch.tensor(self.decoder.embedding_scale, dtype=self.embed.dtype)

    def logits(self, inputs: Inputs, on_layer: Callable[[int], None] | None) -> Tensor | None:
        """Compute the step; logits [draws, vocab] in the model's dtype, None if nothing is drawn.

        `on_layer(layer)` is called right after a layer's KV is stored.
        """
        x = F.embedding(inputs.token_ids, self.embed) * self.embedding_scale
        if self.positions is not None:
            x += F.embedding(inputs.positions, self.positions)
        angles = [None if each is None else rotary_angles(inputs.positions, *each) for each in self.frequencies]
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            query, spans = self._store(layer, x, inputs.groups[layer.group], angles[layer.group]), inputs.groups[layer.group].spans
            if on_layer:
                on_layer(number)
            if number == last:
                if not len(inputs.drawn):
                    return None
                # Only what is drawn is still needed: after a chunk of 512 the first token comes in 18 ms instead of 40.
                x, query, spans = x.index_select(0, inputs.drawn), query.index_select(0, inputs.drawn), inputs.last_spans
            mixed = attend(query, layer.cache, spans, self.decoder.query_scale, self.decoder.attention_softcap)
            x = self._mlp(layer, self._residual(x, linear(mixed, layer.o, layer.o_bias), layer.attention_out_norm))
        return softcap_(linear(self._normed(x, self.norm), self.head), self.decoder.logit_softcap)

    def _store(self, layer: Layer, x: Tensor, group: GroupInputs, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Store keys and values of [tokens, hidden]; the rotated queries, [tokens, heads, head_dim]."""
        heads, kv_heads = self.decoder.heads, self.decoder.kv_heads
        qkv = linear(self._normed(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(len(x), heads + 2 * kv_heads, self.decoder.head_dim)
        qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, self.decoder.norm_eps)
        if angles is not None:
            qk = rotate(qk, *angles)
        store_kv(layer.cache, qk[:, heads:], values, group.store)
        return qk[:, :heads]

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        opened = gated(linear(self._normed(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias), self.decoder.activation)
        return self._residual(x, linear(opened, layer.down, layer.down_bias), layer.mlp_out_norm)

    def _residual(self, x: Tensor, change: Tensor, norm: Tensor | None) -> Tensor:
        return x + (change if norm is None else self._normed(change, norm))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.decoder.layer_norm:
            return layer_norm(x, weight[0], weight[1], self.decoder.norm_eps)
        return rms_norm(x, weight, self.decoder.norm_eps)


def _layer(tensors: Mapping[str, Tensor], number: int, group: int, cache: Tensor) -> Layer:
    def weight(name: str) -> Tensor:
        return tensors[f"{number}.{name}"]

    return Layer(
        attention_norm=weight("attention_norm"),
        qkv=weight("qkv"),
        qk_norm=tensors.get(f"{number}.qk_norm"),
        o=weight("o"),
        attention_out_norm=tensors.get(f"{number}.attention_out_norm"),
        mlp_norm=weight("mlp_norm"),
        gate_up=weight("gate_up"),
        down=weight("down"),
        mlp_out_norm=tensors.get(f"{number}.mlp_out_norm"),
        qkv_bias=tensors.get(f"{number}.qkv_bias"),
        o_bias=tensors.get(f"{number}.o_bias"),
        gate_up_bias=tensors.get(f"{number}.gate_up_bias"),
        down_bias=tensors.get(f"{number}.down_bias"),
        cache=cache,
        group=group,
    )
