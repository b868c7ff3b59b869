"""What benchmarks of the engine alone have in common: how they ask for a model, memory for its cache, and what a step has to read of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from diptych.core.layout import Layout
from diptych.core.model import CARD
from diptych.engine.location import demo_source
from diptych.engine.prepared import PreparedModel
from diptych.engine.weights import is_product, product
from diptych.kv_transfer.pool import DTYPES
from torch import Tensor

CPU = torch.device("cpu")


def asked(parser: ArgumentParser) -> tuple[Namespace, str]:
    """The options, with those that all have, and the source of the model; torch has as many threads as asked for. The process ends where
    there is no such source."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a source of a model; by default the demo model")
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    source = options.model or demo_source()
    if source is None:
        parser.error("the demo model's package is not installed; name a --model")
    if Path(source, CARD).is_file():
        parser.error("--model is prepared already: name its source, of which each variant is prepared")
    torch.set_num_threads(options.threads)
    return options, source


def empty_caches(layout: Layout, device: torch.device = CPU) -> list[list[Tensor]]:
    """As a pool allocates them: of each group, of each layer [blocks, kv_heads, 2, block, width]."""
    shapes = [(blocks, g.kv_heads, 2, layout.block_size, g.width) for g, blocks in zip(layout.groups, layout.num_blocks, strict=True)]
    return [
        [torch.zeros(shape, dtype=DTYPES[g.dtype], device=device) for _ in g.layers] for g, shape in zip(layout.groups, shapes, strict=True)
    ]


def stored(model: PreparedModel) -> tuple[int, int, int, int]:
    """Of the products of all layers together, and of the head: weights, bytes."""
    names = [name for name in model.tensors if is_product(name) and name not in ("embed", "head")]
    head = product(model.tensors, "head" if "head" in model.tensors else "embed")
    layers = [product(model.tensors, name).shape for name in names]
    return (
        sum(outputs * inputs for outputs, inputs in layers),
        sum(model.card.matrix_bytes(*shape) for shape in layers),
        head.shape[0] * head.shape[1],
        model.card.table_bytes(*head.shape),
    )


def kv_bytes(model: PreparedModel, held: int) -> int:
    """Of so many tokens in all layers, none of which a window has passed."""
    return held * sum(group.token_bytes * len(group.layers) for group in model.card.cache_groups())
