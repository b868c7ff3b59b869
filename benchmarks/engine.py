"""Step times of the engine on the demo model, against what the machine could do.

    python -P benchmarks/engine.py [--threads 1] [--dtype bfloat16] [--model DIRECTORY]

Prefill is bound by arithmetic, decode by reading the weights (and the KV) once; both bounds are measured first, with one large
matrix product and one pass over the weights. Times are the least of several runs, in milliseconds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Batch, Draw, Row
from diptych.engine.engine import Engine
from diptych.engine.location import demo_source
from diptych.engine.prepared import PreparedModel, find_or_prepare, open_prepared
from diptych.engine.weights import TORCH_DTYPE

BLOCK = 16
SEQUENCE = 1024
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
    "top-k 50, top-p 0.9": SamplingParams(temperature=1.0, seed=1, top_k=50, top_p=0.9),
}


def least(run: Callable[[], object], times: int = 9) -> float:
    """The least time of `times` runs after one to warm up, ms."""
    run()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product."""
    size = 1536
    left, right = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / least(lambda: left @ right, 5) * 1e3


def peak_read(model: PreparedModel) -> float:
    """Bytes per second of one pass over the largest weight."""
    weights = model.tensors["embed"].view(torch.int32)
    return weights.nbytes / least(lambda: weights.amax(dim=1), 5) * 1e3


class Bench:
    """An engine with 16 sequences of 1,024 tokens."""

    def __init__(self, model: PreparedModel) -> None:
        layout = model.card.layout(block_size=BLOCK, kv_tokens=16 * SEQUENCE)
        dtype = TORCH_DTYPE[model.card.dtype]
        shapes = [(count, g.kv_heads, 2, BLOCK, g.head_dim) for g, count in zip(layout.groups, layout.num_blocks, strict=True)]
        caches = [[torch.zeros(shape, dtype=dtype) for _ in g.layers] for g, shape in zip(layout.groups, shapes, strict=True)]
        self.engine = Engine(model, caches, block_size=BLOCK, max_slots=16)
        order = random.Random(0)
        per_sequence = SEQUENCE // BLOCK
        scattered = [order.sample(range(count), count) for count in layout.num_blocks]
        self.tables = [tuple(tuple(each[i * per_sequence : (i + 1) * per_sequence]) for each in scattered) for i in range(16)]
        self.prompt = tuple(order.randrange(3, model.card.vocab_size) for _ in range(SEQUENCE))
        for slot in range(16):
            self.prefill(slot, 0, 384)

    def prefill(self, slot: int, start: int, length: int) -> None:
        draw = Draw(SAMPLINGS["greedy"], 0)
        self.engine.run(Batch(0, (Row(slot, start, self.prompt[start : start + length], self.tables[slot], (draw,)),)))

    def decode(self, rows: int, sampling: SamplingParams) -> None:
        """One token for `rows` sequences that hold 256 to 376 tokens."""
        self.engine.run(Batch(0, tuple(Row(slot, 256 + 8 * slot, (), self.tables[slot], (Draw(sampling, 1),)) for slot in range(rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--model", help="a prepared model or a source of one; by default the demo model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = options.model or demo_source()
    if source is None:
        parser.error("the demo model's package is not installed; name a --model")
    model = open_prepared(Path(find_or_prepare(source, dtype=DType(options.dtype))))
    read, flops = peak_read(model), peak_flops(TORCH_DTYPE[model.card.dtype])
    print(f"{model.card.name} {model.card.dtype}, {options.threads} thread(s): {read / 1e9:.1f} GB/s, {flops / 1e9:.0f} GFLOP/s")
    bench = Bench(model)
    matrices = sum(t.numel() for name, t in model.tensors.items() if t.dim() == 2 and name not in ("embed", "head"))
    head_ms = model.tensors["embed"].nbytes / read * 1e3
    for start, length in ((0, 16), (0, 64), (0, 256), (256, 256), (0, 512)):
        took = least(partial(bench.prefill, 0, start, length))
        bound = 2 * matrices * length / flops * 1e3 + head_ms
        print(f"prefill {length:4d} tokens from {start:3d}: {took:7.1f} ms, {bound / took:4.0%} of the bound")
    for rows in (1, 4, 16):
        for name, sampling in SAMPLINGS.items():
            took = least(partial(bench.decode, rows, sampling))
            kv = sum(2 * g.kv_heads * g.head_dim * g.dtype.itemsize * len(g.layers) * 316 for g in model.card.cache_groups()) * rows
            bound = (model.card.weights_bytes + kv) / read * 1e3
            print(f"decode {rows:2d} rows, {name:20s}: {took:7.1f} ms, {bound / took:4.0%} of the bound")


if __name__ == "__main__":
    main()
