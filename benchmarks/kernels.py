"""Each Triton kernel against what the GPU can do: copy bandwidth and matrix products, measured in the same run.

    python -m diptych.benchmarks.kernels [--dtype bfloat16] [--keep kernels]

Shapes are those of an 8B Llama (32 heads, 8 KV heads, head_dim 128, hidden 4096, MLP 14,336). What is bound by memory is printed as a share
of the copy's bandwidth, counting what has to be read and written once; prefill attention as a share of the products' rate, beside torch's
fastest fused attention. Times are medians (`triton.testing.do_bench`, which empties the second-level cache before each run), each beside
its twin in torch, and attention beside FlashInfer where that is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diptych.benchmarks.attention_peers import HAS_FLASHINFER, flashinfer_decode, flashinfer_prefill, gathered, timed
from diptych.benchmarks.gpu import Clock, copy_rate, described, device_clock, matmul_rate, need_gpu
from diptych.benchmarks.record import describe, keep, surroundings
from diptych.kernels.attend_chunks import make_paged_chunks
from diptych.kernels.attend_singles import make_paged_singles
from diptych.kernels.gated import gated, gated_torch
from diptych.kernels.kv_store import store_rows
from diptych.kernels.move_rows import move_rows, move_rows_torch
from diptych.kernels.noise import Noise
from diptych.kernels.paged_attention import attend
from diptych.kernels.paging import Paging
from diptych.kernels.residual_norm import residual_norm, residual_norm_torch
from diptych.kernels.rotary_store import rotary_store, rotary_store_torch
from diptych.kernels.sampling import Ask, draw, draw_torch, edges_sorted, limits_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP = 16, 32, 8, 128, 4096, 14_336
BATCHES, CONTEXTS, TOKENS = (1, 16, 64, 256), (1024, 8192, 32_768), (1, 64, 4096)
DRAWN = (1, 16, 64)
LIMITS = {"top-k 50": (50, 1.0, 0.0), "top-p 0.9": (0, 0.9, 0.0), "all three": (50, 0.9, 0.01)}
PREFILLS = ((0, 2048), (0, 8192), (6144, 2048))
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Sizes:
    """What is measured; a test takes smaller ones."""

    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    tokens: tuple[int, ...] = TOKENS
    prefills: tuple[tuple[int, int], ...] = PREFILLS
    drawn: tuple[int, ...] = DRAWN
    moved: int = 256 << 20
    vocabulary: int = 128_256


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: the bytes that have to move, or the operations that have to be made, and the same by torch and by
    FlashInfer."""

    kernel: str
    shape: str
    run: Callable[[], object]
    twin: Callable[[], object] | None
    bytes: int = 0
    flops: int = 0
    flashinfer: Callable[[], object] | None = None


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One after the other, so that what one holds is free before the next."""
    for tokens in sizes.tokens:
        yield from small(tokens, dtype, device)
    yield from moves(sizes.moved, dtype, device)
    yield from (drawing(rows, sizes.vocabulary, dtype, device) for rows in sizes.drawn)
    yield from (limiting(name, rows, sizes.vocabulary, dtype, device) for rows in sizes.drawn for name in LIMITS)
    for context in sizes.contexts:
        yield from (decode(batch, context, dtype, device) for batch in sizes.batches)
    for start, length in sizes.prefills:
        yield prefill(start, length, dtype, device)


def small(tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    x, change, weight, gate_up = random(tokens, HIDDEN), random(tokens, HIDDEN), torch.ones(HIDDEN, device=device), random(tokens, 2 * MLP)
    norm = (x, change, None, weight, 1e-6)
    yield Case("residual_norm", f"{tokens}", lambda: residual_norm(*norm), lambda: residual_norm_torch(*norm), 4 * x.nbytes)
    yield Case("gated", f"{tokens}", lambda: gated(gate_up, "silu"), lambda: gated_torch(gate_up, "silu"), gate_up.nbytes * 3 // 2)
    qkv = random(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cache = random(-(-tokens // BLOCK), KV_HEADS, 2, BLOCK, HEAD_DIM)
    at = torch.arange(tokens)
    rows = store_rows(at // BLOCK, at % BLOCK, kv_heads=KV_HEADS, block_size=BLOCK).to(device)
    angles = (torch.ones(tokens, 1, HEAD_DIM // 2, device=device), torch.zeros(tokens, 1, HEAD_DIM // 2, device=device))
    options: dict[str, Any] = {"heads": HEADS, "qk_norm": None, "angles": angles, "eps": 1e-6}
    moved = 2 * qkv.nbytes + rows.nbytes + 2 * angles[0].nbytes
    run, twin = (lambda: rotary_store(qkv, cache, rows, **options)), (lambda: rotary_store_torch(qkv, cache, rows, **options))
    yield Case("rotary_store", f"{tokens}", run, twin, moved)


def moves(size: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Scattered blocks to a staging slot and back; of each block the second half of its heads, as to one of two ranks; and in another
    dtype, which in float16 is checked."""
    per_head = 2 * BLOCK * HEAD_DIM
    blocks = size // (KV_HEADS * per_head * dtype.itemsize)
    pool, slot = torch.randn(2, blocks, KV_HEADS * per_head, dtype=dtype, device=device)
    order, rows = torch.randperm(blocks, device=device), torch.arange(blocks, device=device)
    yield moving(f"{blocks} blocks, gathered", pool, slot, order, rows)
    yield moving(f"{blocks} blocks, scattered", slot, pool, rows, order)
    heads = torch.arange(KV_HEADS // 2, KV_HEADS, device=device)
    there = torch.arange(blocks * len(heads), device=device)
    yield moving(
        f"half of {blocks}' heads", pool.view(-1, per_head), slot.view(-1, per_head), (order[:, None] * KV_HEADS + heads).view(-1), there
    )
    other = torch.bfloat16 if dtype is torch.float16 else torch.float16
    yield moving(f"{blocks} blocks, cast", pool, torch.empty_like(slot, dtype=other), order, rows)


def moving(shape: str, source: Tensor, destination: Tensor, here: Tensor, there: Tensor) -> Case:
    checked = destination.dtype is torch.float16 and source.dtype is not torch.float16
    run = lambda: move_rows(source, destination, here, there)  # noqa: E731
    twin = lambda: move_rows_torch(source, destination, here, there, checked)  # noqa: E731
    return Case("move_rows", shape, run, twin, len(here) * source.shape[1] * (source.itemsize + destination.itemsize))


def drawing(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Case:
    """At a temperature and without limits, with the upload of what is asked; torch draws row by row."""
    logits, asks = torch.randn(rows, vocabulary, dtype=dtype, device=device), [Ask(row, Noise(1, 0, row), 0.8) for row in range(rows)]
    twin = lambda: [draw_torch(logits[ask.row], ask) for ask in asks]  # noqa: E731
    return Case("draw", f"{rows} x {vocabulary}", lambda: draw(logits, asks), twin, logits.nbytes)


def limiting(name: str, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Case:
    """What limits let through, with the upload of what is asked; the bound reads the logits once. torch sorts."""
    logits = torch.randn(rows, vocabulary, dtype=dtype, device=device)
    asks = [Ask(row, Noise(1, 0, row), 0.8, *LIMITS[name]) for row in range(rows)]
    run, twin = (lambda: limits_of(logits, asks)), (lambda: edges_sorted(logits, asks))
    return Case("edges", f"{rows} x {vocabulary}, {name}", run, twin, logits.nbytes)


def paged(sequences: int, context: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[list[int]]]:
    """A cache, and the tables of sequences whose blocks lie scattered in it."""
    each = -(-context // BLOCK)
    cache = torch.randn(sequences * each, KV_HEADS, 2, BLOCK, HEAD_DIM, dtype=dtype, device=device)
    return cache, torch.randperm(len(cache)).view(sequences, each).tolist()


def decode(batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Case:
    cache, tables = paged(batch, context, dtype, device)
    query = torch.randn(batch, HEADS, HEAD_DIM, dtype=dtype, device=device)
    span = make_paged_singles(range(batch), [context - 1] * batch, tables, Paging(KV_HEADS, BLOCK, 0))
    span = type(span)(*(part.to(device) for part in (span.tokens, span.tables, span.firsts, span.lasts)))
    run = lambda: attend(query, cache, [span], HEAD_DIM**-0.5)  # noqa: E731
    twin, theirs = gathered(query, cache, tables), flashinfer_decode(query, cache, tables)
    return Case("attend_singles", f"{batch} x {context}", run, twin, cache.nbytes + 2 * query.nbytes, flashinfer=theirs)


def prefill(start: int, length: int, dtype: torch.dtype, device: torch.device) -> Case:
    """`length` tokens behind `start` that are cached; torch has keys and values as it wants them, without a gather."""
    context = start + length
    cache, tables = paged(1, context, dtype, device)
    query = torch.randn(length, HEADS, HEAD_DIM, dtype=dtype, device=device)
    span = make_paged_chunks([(0, start, length, tables[0])], Paging(KV_HEADS, BLOCK, 0))
    places, sums, positions, blocks = (part.to(device) for part in (span.places, span.sums, span.positions, span.tables))
    span = type(span)(places, sums, positions, blocks, span.tokens, span.window)
    keys = torch.randn(2, 1, HEADS, context, HEAD_DIM, dtype=dtype, device=device)
    queries = query.transpose(0, 1)[None].contiguous()
    twin = None if start else (lambda: F.scaled_dot_product_attention(queries, keys[0], keys[1], is_causal=True))
    pairs = length * start + length * (length + 1) // 2
    run = lambda: attend(query, cache, [span], HEAD_DIM**-0.5)  # noqa: E731
    theirs = flashinfer_prefill(query, cache, tables[0])
    return Case("attend_chunks", f"{length} behind {start}", run, twin, flops=4 * pairs * HEADS * HEAD_DIM, flashinfer=theirs)


def fastest(twin: Callable[[], object], clock: Clock) -> float | None:
    """Of torch's fused attentions, where they take such a shape at all."""
    found = []
    for backend in FUSED:
        with sdpa_kernel(backend):
            found.append(timed(f"torch's {backend.name}", twin, clock))
    return min([each for each in found if each is not None], default=None)


def measure(sizes: Sizes, dtype: torch.dtype, device: torch.device, clock: Clock) -> dict[str, Any]:
    copied, multiplied = copy_rate(sizes.moved * 4, device, clock), matmul_rate(8192 if device.type == "cuda" else 64, dtype, device, clock)
    print(f"copy {copied / 1e9:.0f} GB/s, products {multiplied / 1e12:.1f} TFLOP/s")
    if not HAS_FLASHINFER:
        print("FlashInfer is not installed: attention is not compared with it")
    results: dict[str, Any] = {"copy_gb_s": copied / 1e9, "matmul_tflop_s": multiplied / 1e12, "kernels": []}
    for case in cases(sizes, dtype, device):
        took = clock(case.run)
        bound = case.bytes / copied * 1e3 if case.bytes else case.flops / multiplied * 1e3
        others = beside(case, clock)
        said = "".join(f", {name} {ms:.4f} ms" for name, ms in others.items() if ms is not None)
        print(f"{case.kernel:14} {case.shape:>22}: {took:.4f} ms, {bound / took:4.0%} of the bound{said}")
        figures = {"kernel": case.kernel, "shape": case.shape, "ms": took, "bound_ms": bound}
        results["kernels"].append(figures | {f"{name}_ms": ms for name, ms in others.items()})
    return results


def beside(case: Case, clock: Clock) -> dict[str, float | None]:
    """What others take for it, None where they do not do it. For attention of prompts torch has three ways, of which the fastest counts."""
    twin = None if case.twin is None else fastest(case.twin, clock) if case.flops else timed("torch", case.twin, clock)
    return {"torch": twin, "flashinfer": None if case.flashinfer is None else timed("FlashInfer", case.flashinfer, clock)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diptych.benchmarks.kernels", description="How near do the Triton kernels come to the GPU?"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    device = need_gpu()
    where = surroundings()
    where["gpu"] = described(device)
    print(f"{where['gpu']['name']}, triton {where['gpu']['triton']}; {describe(where)}")
    with torch.inference_mode():
        results = measure(Sizes(), getattr(torch, options.dtype), device, device_clock)
    if options.keep:
        print(f"kept in {keep(options.keep, where, vars(options), results)}")


if __name__ == "__main__":
    main()
