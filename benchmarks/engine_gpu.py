"""Steps of the engine on a GPU, as a worker makes them, against what the GPU could do: decode steps captured and one launched behind the
other, and whole prompts. By `python -m diptych.benchmarks.engine --device cuda`; not run on a GPU yet.

A decode step is bound by reading the weights and the KV once, at the rate of a copy (read and written); a prompt by its products,
attention's among them, at the rate of one large product. Times are wall-clock, the host's part included, the least of a few runs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diptych.benchmarks.bare_engine import empty_caches, kv_bytes, stored
from diptych.core.model import Decoder
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Batch, Draw, Row
from diptych.engine.decode_graphs import Capture
from diptych.engine.decode_shapes import decode_shapes, shape_for
from diptych.engine.engine import Engine
from diptych.engine.prepared import PreparedModel

BLOCK = 16
RUNS = 3
GREEDY = (Draw(SamplingParams(temperature=0.0), 1),)


@dataclass(frozen=True, slots=True)
class Sizes:
    """`steps` decode steps in a row of sequences that hold `context` tokens before; a test takes fewer."""

    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 1024
    steps: int = 64
    prefills: tuple[int, ...] = (2048, 4096, 8192)


class Bench:
    """An engine over a cache full of random numbers, whose sequences' blocks lie scattered."""

    def __init__(self, model: PreparedModel, sizes: Sizes, device: torch.device) -> None:
        self._sizes, self._order = sizes, random.Random(0)
        count = max(sizes.batches)
        each = -(-(sizes.context + sizes.steps) // BLOCK)
        blocks = max(count * each, -(-max(sizes.prefills) // BLOCK)) + 1
        layout = model.card.layout(block_size=BLOCK, kv_tokens=blocks * BLOCK)
        caches = empty_caches(layout, device)
        for cache in (cache for group in caches for cache in group):
            cache.normal_()
        self.engine = Engine(model, caches, block_size=BLOCK, max_slots=count, device=device)
        scattered = [tuple(self._order.sample(range(blocks - 1), blocks - 1)) for _ in layout.groups]  # the last is the captured steps'
        self._all = tuple(scattered)
        self._tables = [tuple(group[i * each : (i + 1) * each] for group in scattered) for i in range(count)]
        self._vocabulary = model.card.vocab_size
        self._context = model.card.max_context
        for slot, tables in enumerate(self._tables):  # a token to begin with
            self.engine.run(Batch(0, (Row(slot, 0, self._ids(BLOCK), tables, GREEDY),)))

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._order.randrange(self._vocabulary) for _ in range(count))

    def capture(self, capture: Capture) -> None:
        """The shapes in which a worker would have these steps captured. `RuntimeError` if that cannot be."""
        sizes, every = self._sizes, decode_shapes(max(self._sizes.batches), self._context)
        found = {shape_for(every, rows, sizes.context + sizes.steps) for rows in sizes.batches}
        self.engine.capture(tuple(sorted((each for each in found if each is not None), reverse=True)), capture, lambda done: None)

    def decode(self, rows: int) -> float:
        """Milliseconds a step, of which one is launched behind the one that computes; the batches are decided before."""
        batches = [
            Batch(number, tuple(Row(slot, self._sizes.context + number, (), self._tables[slot], GREEDY) for slot in range(rows)))
            for number in range(self._sizes.steps)
        ]
        return least(lambda: self._one_behind_another(batches)) / len(batches)

    def _one_behind_another(self, batches: list[Batch]) -> None:
        running = self.engine.launch(batches[0])
        for batch in batches[1:]:
            behind = self.engine.launch(batch)
            running()
            running = behind
        running()

    def prefill(self, tokens: int) -> float:
        """Milliseconds until a prompt's first token is here."""
        batch = Batch(0, (Row(0, 0, self._ids(tokens), self._all, GREEDY),))
        return least(lambda: self.engine.run(batch))


def least(run: Callable[[], object]) -> float:
    """Milliseconds, after one run that compiles what is not compiled. A run ends when its tokens are here."""
    run()
    taken = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return 1e3 * min(taken)


def measure(
    model: PreparedModel, read: float, flops: float, device: torch.device, capture: Capture, sizes: Sizes | None = None
) -> dict[str, Any]:
    """On a device that copies so many bytes a second and multiplies so fast."""
    sizes = sizes or Sizes()
    print(f"{model.card.name} {model.card.precision}: copies {read / 1e9:.0f} GB/s, multiplies {flops / 1e12:.1f} TFLOP/s")
    bench = Bench(model, sizes, device)
    prefills = [prompt(bench, model, tokens, flops) for tokens in sizes.prefills if tokens <= model.card.max_context]
    eager = {rows: bench.decode(rows) for rows in sizes.batches}
    captured: dict[int, float] = {}
    try:
        bench.capture(capture)
        captured = {rows: bench.decode(rows) for rows in sizes.batches}
    except RuntimeError as error:
        print(f"steps cannot be captured: {error}")
    decodes = [step(model, sizes, rows, eager[rows], captured.get(rows), read, flops) for rows in sizes.batches]
    return {"read_gb_s": read / 1e9, "gflop_s": flops / 1e9, "prefill": prefills, "decode": decodes}


def prompt(bench: Bench, model: PreparedModel, tokens: int, flops: float) -> dict[str, Any]:
    took, bound = bench.prefill(tokens), 1e3 * operations(model, tokens) / flops
    print(f"prefill {tokens:5d} tokens: {took:8.2f} ms, {bound / took:4.0%} of the bound")
    return {"tokens": tokens, "start": 0, "ms": took, "bound_ms": bound}


def step(
    model: PreparedModel, sizes: Sizes, rows: int, eager: float, captured: float | None, read: float, flops: float
) -> dict[str, float | None]:
    """The mean of the steps: sequences grow by a token each."""
    matrices, matrices_bytes, head, head_bytes = stored(model)
    reading = 1e3 * (matrices_bytes + head_bytes + kv_bytes(model, 1) * rows * (sizes.context + (sizes.steps + 1) / 2)) / read
    computing = 1e3 * 2 * (matrices + head) * rows / flops
    bound = max(reading, computing)
    said = "not captured" if captured is None else f"captured {captured:.3f} ms, {bound / captured:4.0%} of the bound"
    print(f"decode {rows:3d} rows: {said}; kernel by kernel {eager:.3f} ms; bound {bound:.3f} ms")
    return {"rows": rows, "ms": captured, "eager_ms": eager, "reading_ms": reading, "computing_ms": computing}


def operations(model: PreparedModel, tokens: int) -> int:
    """Floating-point operations of a prompt: products, attention by what is seen, and one row of the head."""
    decoder = model.card.decoder
    assert isinstance(decoder, Decoder), "on the fast path"
    matrices, _, head, _ = stored(model)
    seen = sum(sum(min(position + 1, window or tokens) for position in range(tokens)) for window in decoder.windows)
    return 2 * matrices * tokens + 4 * seen * decoder.heads * decoder.head_dim + 2 * head
