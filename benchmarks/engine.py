"""Step times of the engine on the demo model, against what the machine could do, and where a decode step's time goes.

    python -m diptych.benchmarks.engine [--threads 1] [--dtype bfloat16] [--quantization none int8 int4] [--model SOURCE] [--torch]
    python -m diptych.benchmarks.engine --device cuda [--dtype bfloat16] [--model SOURCE]

A step is bound by arithmetic or by reading the weights (and the KV) once; both speeds are measured first, with a large matrix product
and with passes over the weights. Times are the least of several runs, in milliseconds. On a shared machine: `taskset -c 1`. What is
measured on a GPU is in engine_gpu.py.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diptych.benchmarks import engine_gpu
from diptych.benchmarks.bare_engine import asked, empty_caches, kv_bytes, stored
from diptych.benchmarks.gpu import copy_rate, described, device_clock, matmul_rate, need_gpu
from diptych.benchmarks.record import describe, keep, surroundings
from diptych.core.layout import DType
from diptych.core.quantization import Quantization
from diptych.core.sampling import SamplingParams
from diptych.engine import decoder as decoder_module
from diptych.engine import engine as engine_module
from diptych.engine.batch import Batch, Draw, Row
from diptych.engine.cuda_capture import CudaCapture
from diptych.engine.engine import Engine
from diptych.engine.prepared import PreparedModel, find_or_prepare, open_prepared
from diptych.engine.weights import TORCH_DTYPE

BLOCK = 16
SEQUENCE = 512
ROWS = (1, 2, 4, 8, 16, 32)
PREFILLS = ((0, 16), (0, 64), (0, 256), (256, 256), (0, 512))
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
    "top-k 50, top-p 0.9": SamplingParams(temperature=1.0, seed=1, top_k=50, top_p=0.9),
}
PARTS = {
    decoder_module: ("linear", "linear_in_parts", "attend", "rotary_store", "residual_norm", "rms_norm", "gated", "rotary_angles"),
    engine_module: ("sample",),
    Engine: ("inputs_of",),
}
"""What a step's time is divided among; what is left is the rest."""


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
    """Floating-point operations per second of one large matrix product in `dtype`, or in fp32 where that is faster, as on an Intel core
    without AMX: what is stored in `dtype` can be computed in it."""
    size = 768

    def seconds(each: torch.dtype) -> float:
        left, right = torch.randn(2, size, size).to(each)
        return least(lambda: left @ right, 200) / 1e3

    return 2 * size**3 / min(seconds(each) for each in {dtype, torch.float32})


def peak_read(model: PreparedModel) -> float:
    """Bytes per second of passes over the largest weight, as it is mapped: the least time of each of its parts, of 2,048 rows."""
    weights = model.tensors["embed"]
    words = weights.view(torch.float32)
    parts = [words[start : start + 2048] for start in range(0, words.shape[0], 2048)]
    best = [float("inf")] * len(parts)
    for _ in range(20):
        for number, part in enumerate(parts):
            start = time.perf_counter()
            part.sum()
            best[number] = min(best[number], time.perf_counter() - start)
    return weights.nbytes / sum(best)


class Bench:
    """An engine with sequences of 512 tokens."""

    def __init__(self, model: PreparedModel) -> None:
        count = max(ROWS)
        layout = model.card.layout(block_size=BLOCK, kv_tokens=count * SEQUENCE)
        self.engine = Engine(model, empty_caches(layout), block_size=BLOCK, max_slots=count)
        order = random.Random(0)
        per_sequence = SEQUENCE // BLOCK
        scattered = [order.sample(range(blocks), blocks) for blocks in layout.num_blocks]
        self.tables = [tuple(tuple(each[i * per_sequence : (i + 1) * per_sequence]) for each in scattered) for i in range(count)]
        self.prompt = tuple(order.randrange(3, model.card.vocab_size) for _ in range(SEQUENCE))
        for slot in range(count):
            self.prefill(slot, 0, 8)
        self.prefill(0, 0, 256)

    def prefill(self, slot: int, start: int, length: int) -> None:
        draw = Draw(SAMPLINGS["greedy"], 0)
        self.engine.run(Batch(0, (Row(slot, start, self.prompt[start : start + length], self.tables[slot], (draw,)),)))

    def decode(self, rows: int, sampling: SamplingParams) -> None:
        """One token for `rows` sequences that hold 256 to 504 tokens."""
        self.engine.run(Batch(0, tuple(Row(slot, place(slot), (), self.tables[slot], (Draw(sampling, 1),)) for slot in range(rows))))


def place(slot: int) -> int:
    """The position a slot decodes at."""
    return 256 + 8 * slot


@contextmanager
def timed(vocab_size: int) -> Iterator[list[tuple[str, float]]]:
    """Every call of `PARTS`, in order: its part and its milliseconds; the head apart from the other products."""
    calls: list[tuple[str, float]] = []

    def timing(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            out = run(*args, **options)
            part = ("head" if len(args[1]) == vocab_size else "products") if name.startswith("linear") else name
            calls.append((part, 1e3 * (time.perf_counter() - start)))
            return out

        return call

    kept = {(module, name): getattr(module, name) for module, names in PARTS.items() for name in names}
    for (module, name), run in kept.items():
        setattr(module, name, timing(name, run))
    try:
        yield calls
    finally:
        for (module, name), run in kept.items():
            setattr(module, name, run)


def profile(bench: Bench, rows: int, vocab_size: int, times: int = 40) -> dict[str, float]:
    """Milliseconds of a greedy decode step by part: the sum over the part's calls of the least each took in several steps."""
    best: list[tuple[str, float]] = []
    rest = float("inf")
    for _ in range(times):
        with timed(vocab_size) as calls:
            start = time.perf_counter()
            bench.decode(rows, SAMPLINGS["greedy"])
            rest = min(rest, 1e3 * (time.perf_counter() - start) - sum(ms for _, ms in calls))
        best = [min(pair) for pair in zip(best, calls, strict=True)] if best else calls
    parts = {"rest": rest}
    for part, ms in best:
        parts[part] = parts.get(part, 0.0) + ms
    return dict(sorted(parts.items(), key=lambda each: -each[1]))


def measure(model: PreparedModel, read: float, flops: float) -> dict[str, Any]:
    """Of one model, on a machine that reads and computes as fast as that."""
    card = model.card
    print(f"{card.name} {card.precision}:")
    bench = Bench(model)
    matrices, matrices_bytes, head, head_bytes = stored(model)
    results: dict[str, Any] = {"read_gb_s": read / 1e9, "gflop_s": flops / 1e9, "prefill": [], "decode": []}
    for start, length in PREFILLS:
        took = least(partial(bench.prefill, 0, start, length))
        bound = 2 * matrices * length / flops * 1e3 + head_bytes / read * 1e3
        print(f"prefill {length:4d} tokens from {start:3d}: {took:7.1f} ms, {bound / took:4.0%} of the bound")
        results["prefill"].append({"tokens": length, "start": start, "ms": took, "bound_ms": bound})
    for rows in ROWS:
        held = sum(place(slot) + 1 for slot in range(rows))
        reading, computing = (matrices_bytes + head_bytes + kv_bytes(model, held)) / read * 1e3, 2 * (matrices + head) * rows / flops * 1e3
        bound = max(reading, computing)
        parts = profile(bench, rows, card.vocab_size)
        step = sum(parts.values())
        print(f"decode {rows:2d} rows: {step:6.1f} ms, {bound / step:4.0%} of the bound ({reading:.1f} reading, {computing:.1f} computing)")
        print("    " + ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items()))
        whole = {name: least(partial(bench.decode, rows, sampling), 15) for name, sampling in SAMPLINGS.items()}
        print("    whole steps: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in whole.items()))
        figures = {"rows": rows, "ms": step, "parts_ms": parts, "whole_ms": whole, "reading_ms": reading, "computing_ms": computing}
        results["decode"].append(figures)
    return results


def on_gpu(options: argparse.Namespace, model: PreparedModel, device: torch.device) -> None:
    where = surroundings()
    where["gpu"] = described(device)
    print(f"{where['gpu']['name']}; {describe(where)}")
    read = copy_rate(1 << 30, device, device_clock)
    flops = matmul_rate(8192, TORCH_DTYPE[model.card.dtype], device, device_clock)
    results = {str(model.card.quantization): engine_gpu.measure(model, read, flops, device, CudaCapture(device))}
    if options.keep:
        print(f"kept in {keep(options.keep, where, vars(options), results)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.engine", description="What does a step of the engine take?")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--quantization", nargs="+", type=Quantization, choices=list(Quantization), default=[Quantization.NONE], help="one after the other"
    )
    parser.add_argument("--torch", action="store_true", help="without the C++ kernels")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: captured decode steps, long prompts")
    options, source = asked(parser)
    dtype = DType(options.dtype)
    if options.device == "cuda":
        if options.torch or options.quantization != [Quantization.NONE]:
            parser.error("--torch and --quantization are of a CPU")
        device = need_gpu()  # before minutes are spent on preparing
        model = open_prepared(find_or_prepare(source, dtype=dtype))
        if model.card.slow_path:
            parser.error(f"--model: {model.card.slow_path} Nothing of it is captured")
        return on_gpu(options, model, device)
    where = surroundings()
    print(describe(where))
    wide = open_prepared(find_or_prepare(source, dtype=dtype))
    models = [open_prepared(find_or_prepare(source, dtype=dtype, quantization=each)) for each in options.quantization]
    if options.torch:
        os.environ["CXX"] = "none"
    read, flops = peak_read(wide), peak_flops(TORCH_DTYPE[dtype])
    print(f"{torch.get_num_threads()} thread(s): reads {read / 1e9:.1f} GB/s, computes {flops / 1e9:.0f} GFLOP/s in {dtype}")
    results = {str(model.card.quantization): measure(model, read, flops) for model in models}
    if options.keep:
        print(f"kept in {keep(options.keep, where, vars(options), results)}")


if __name__ == "__main__":
    main()
