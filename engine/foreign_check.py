"""Before a model is served on the slow path: does it compute over our cache what transformers computes without one?

What the probe of foreign_card.py cannot see shows here: positions a model counts by itself, biases added elsewhere, tokens mixed
outside attention, weights that did not come through the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.layout import DType
from ..core.model import ModelCard
from ..core.sampling import SamplingParams
from .batch import Draw, Row
from .foreign import TransformersDecoder, silent
from .inputs import CPU, make_inputs
from .sources import UNREADABLE
from .weights import TORCH_DTYPE

_BLOCK = 16
_LENGTHS = (37, 21)
_CUTS = ((0, 18, 36, 37), (0, 2, 20, 21))
"""The steps in which the two sequences are computed, side by side: chunks over the edge of a block, then one token each."""
_TOLERANCE = {DType.FLOAT32: 1e-4, DType.FLOAT16: 0.02, DType.BFLOAT16: 0.1}
"""Of the root mean square of the difference, in the standard deviation of the logits. Tiny random models: 4e-7 and 0.008 at most."""


@torch.inference_mode()
def check_same(card: ModelCard, tensors: Mapping[str, Tensor], reference: Any) -> None:
    """Compute two random sequences, chunked and packed, with `tensors` over our cache and whole with `reference`.

    `ModelError` if the logits differ by more than rounding does.
    """
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(card.vocab_size, (length,), generator=draw) for length in _LENGTHS]
    try:
        with silent():
            reference.set_attn_implementation("eager")
            whole = [reference(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
        ours = _paged(card, tensors, [ids.tolist() for ids in sequences])
    except UNREADABLE as error:
        raise ModelError(f"{card.decoder.family}: transformers cannot run this model over a paged cache: {error}") from error
    theirs = torch.stack([logits[cut[step + 1] - 1] for step in range(3) for logits, cut in zip(whole, _CUTS, strict=True)])
    off = ((ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().std()).item()
    if not off < _TOLERANCE[card.dtype]:
        raise ModelError(
            f"Models of type {card.decoder.family!r} cannot be served: over a paged cache their logits differ from what transformers "
            f"computes without one by {off:.2g} of their spread. Something in them depends on more than attention is told.",
            field="model_type",
        )


def _paged(card: ModelCard, tensors: Mapping[str, Tensor], sequences: list[list[int]]) -> Tensor:
    """Logits after each cut, [steps * sequences, vocab]."""
    groups, dtype = card.cache_groups(), TORCH_DTYPE[card.dtype]
    counts = [-(-len(ids) // _BLOCK) for ids in sequences]
    tables = [tuple(range(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(len(counts))]
    caches = [[torch.zeros(sum(counts), group.kv_heads, 2, _BLOCK, group.head_dim, dtype=dtype) for _ in group.layers] for group in groups]
    decoder = TransformersDecoder(card, tensors, CPU)
    decoder.hold(caches)
    draws = (Draw(SamplingParams(temperature=0.0), 0),)
    steps = []
    for step in range(3):
        rows = tuple(
            Row(i, cut[step], tuple(ids[cut[step] : cut[step + 1]]), (tables[i],) * len(groups), draws)
            for i, (ids, cut) in enumerate(zip(sequences, _CUTS, strict=True))
        )
        logits = decoder.logits(make_inputs(rows, (), groups, block_size=_BLOCK, dtype=dtype), None)
        assert logits is not None
        steps.append(logits)
    return torch.cat(steps)
