"""The decoder: one arithmetic, described by the card, for every family we serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.model import Decoder, ModelCard, Rope
from ..kernels.gated import gated
from ..kernels.layer_norm import layer_norm
from ..kernels.linear import linear, linear_in_parts
from ..kernels.paged_attention import attend
from ..kernels.quantized import embedded
from ..kernels.residual_norm import residual_norm
from ..kernels.rms_norm import rms_norm
from ..kernels.rotary import rotary_angles
from ..kernels.rotary_store import rotary_store
from ..kernels.softcap import softcap_
from .inputs import GroupInputs, Inputs
from .parallel import Parallel
from .placing import Upload
from .rope import frequencies
from .shards import Part, Shard
from .weights import TORCH_DTYPE, product


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights (in weights.py, of which a shard has a part), the norm that comes next, and the index of its cache group."""

    attention_norm: Tensor
    qkv: tuple[Part, ...]
    qk_norm: Tensor | None
    o: Part
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: tuple[Part, ...]
    down: Part
    mlp_out_norm: Tensor | None
    next_norm: Tensor
    group: int


class LoadedDecoder:
    """What one rank has of a model: weights and caches. Stores the KV of the tokens it computes; holds nothing else between steps."""

    def __init__(self, card: ModelCard, tensors: Mapping[str, Tensor], parallel: Parallel, there: Upload) -> None:
        """`hold` it some caches before a step."""
        assert isinstance(card.decoder, Decoder)
        self.decoder, self.parallel = card.decoder, parallel
        self.dtype = TORCH_DTYPE[card.dtype]
        shards = [Shard(self.decoder, parallel.tp, number) for number in range(parallel.tp)]
        self.shard = shards[parallel.shard]
        groups = parallel.groups
        group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        self.layers = {number: _layer(tensors, number, self.shard, group_of[number], there) for number in parallel.layers}
        self.caches: dict[int, Tensor] = {}
        ropes = [self.decoder.rope_window if group.window and self.decoder.rope_window else self.decoder.rope_full for group in groups]
        self.frequencies = [None if rope is None else _frequencies(rope, self.decoder.head_dim, there) for rope in ropes]
        self.vocabularies = [shard.vocabulary(card.vocab_size) for shard in shards]
        self.vocabulary = self.vocabularies[parallel.shard]
        self.embed = there.product(product(tensors, "embed")[self.vocabulary])
        self.positions = there.maybe(tensors.get("positions"))
        self.head = self.embed if self.decoder.tied_head else there.product(product(tensors, "head")[self.vocabulary])
        # transformers rounds the scale to the model's dtype before multiplying; at bf16 and hidden 640 that is 25.25 for 25.298.
        self.embedding_scale = torch.tensor(self.decoder.embedding_scale, dtype=self.dtype)

    def hold(self, caches: Sequence[Sequence[Tensor]]) -> None:
        """`caches[g][i]` is from now on the cache of layer `parallel.groups[g].layers[i]`."""
        self.caches = {layer: caches[g][i] for g, group in enumerate(self.parallel.groups) for i, layer in enumerate(group.layers)}

    def logits(self, inputs: Inputs, on_layer: Callable[[int], None] | None) -> Tensor | None:
        """Compute the step; logits [draws, vocab] in the model's dtype, None if nothing is drawn, or not at this rank.

        `on_layer(layer)` is called right after a layer's KV is stored.
        """
        x = self._embedded(inputs) if self.parallel.first else self._received(inputs)
        angles = [None if each is None else rotary_angles(inputs.positions, *each) for each in self.frequencies]
        last = self.decoder.layers - 1
        normed = self._normed(x, self.layers[self.parallel.layers[0]].attention_norm)
        for number, layer in self.layers.items():
            group, cache = inputs.groups[layer.group], self.caches[number]
            query, spans = self._store(layer, normed, cache, group, angles[layer.group]), group.spans
            if on_layer:
                on_layer(number)
            if number == last:
                if not len(inputs.drawn):
                    return None
                # Only what is drawn is still needed: after a chunk of 512 the first token comes in 18 ms instead of 40.
                x, query, spans = x.index_select(0, inputs.drawn), query.index_select(0, inputs.drawn), inputs.last_spans
            mixed = attend(query, cache, spans, self.decoder.query_scale, self.decoder.attention_softcap)
            attended = self.parallel.sum(linear(mixed, *layer.o))
            x, normed = self._joined(x, attended, layer.attention_out_norm, layer.mlp_norm)
            x, normed = self._joined(x, self._mlp(layer, normed), layer.mlp_out_norm, layer.next_norm)
        if not self.parallel.last:
            self.parallel.send(x)
            return None
        logits = softcap_(linear(normed, self.head), self.decoder.logit_softcap)
        return self.parallel.gather(logits, [ids.stop - ids.start for ids in self.vocabularies])

    def _received(self, inputs: Inputs) -> Tensor:
        return self.parallel.receive(len(inputs.token_ids), self.decoder.hidden, self.dtype, inputs.token_ids.device)

    def _embedded(self, inputs: Inputs) -> Tensor:
        x = embedded(inputs.token_ids, self.embed, self.dtype) if self.parallel.tp == 1 else self._embedded_in_shards(inputs.token_ids)
        x = x * self.embedding_scale
        if self.positions is not None:
            x += F.embedding(inputs.positions, self.positions)
        return x

    def _embedded_in_shards(self, token_ids: Tensor) -> Tensor:
        """Each shard looks up the tokens it has; a token's other parts are zero."""
        places = token_ids - self.vocabulary.start
        elsewhere = (places < 0) | (places >= len(self.embed))
        part = embedded(places.masked_fill_(elsewhere, 0), self.embed, self.dtype)
        return self.parallel.sum(part.masked_fill_(elsewhere[:, None], 0.0))

    def _store(self, layer: Layer, normed: Tensor, cache: Tensor, group: GroupInputs, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Store keys and values of [tokens, hidden]; the rotated queries, [tokens, heads, head_dim]."""
        return rotary_store(
            linear_in_parts(normed, layer.qkv),
            cache,
            group.store,
            heads=self.shard.heads,
            qk_norm=layer.qk_norm,
            angles=angles,
            eps=self.decoder.norm_eps,
        )

    def _mlp(self, layer: Layer, normed: Tensor) -> Tensor:
        opened = gated(linear_in_parts(normed, layer.gate_up), self.decoder.activation)
        return self.parallel.sum(linear(opened, *layer.down))

    def _joined(self, x: Tensor, change: Tensor, out_norm: Tensor | None, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The residual sum, and it normed for what comes next."""
        if self.decoder.layer_norm:
            total = x + change
            return total, self._normed(total, norm)
        return residual_norm(x, change, out_norm, norm, self.decoder.norm_eps)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.decoder.layer_norm:
            return layer_norm(x, weight[0], weight[1], self.decoder.norm_eps)
        return rms_norm(x, weight, self.decoder.norm_eps)


def _frequencies(rope: Rope, head_dim: int, there: Upload) -> tuple[Tensor, float]:
    each, stretch = frequencies(rope, head_dim)
    return there.weight(each), stretch


def _layer(tensors: Mapping[str, Tensor], number: int, shard: Shard, group: int, there: Upload) -> Layer:
    def put(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple((there.product(weight), there.maybe(bias)) for weight, bias in parts)

    return Layer(
        attention_norm=there.weight(tensors[f"{number}.attention_norm"]),
        qkv=put(shard.qkv(tensors, number)),
        qk_norm=there.maybe(shard.qk_norm(tensors, number)),
        o=put((shard.o(tensors, number),))[0],
        attention_out_norm=there.maybe(tensors.get(f"{number}.attention_out_norm")),
        mlp_norm=there.weight(tensors[f"{number}.mlp_norm"]),
        gate_up=put(shard.gate_up(tensors, number)),
        down=put((shard.down(tensors, number),))[0],
        mlp_out_norm=there.maybe(tensors.get(f"{number}.mlp_out_norm")),
        next_norm=there.weight(tensors.get(f"{number + 1}.attention_norm", tensors["norm"])),
        group=group,
    )
