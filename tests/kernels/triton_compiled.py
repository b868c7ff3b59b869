"""Compiles the Triton kernels for GPUs that are not here: `python triton_compiled.py 90` prints, as JSON, what each takes of one.

Triton brings NVIDIA's assembler, and compiles for a target that is only named. So a kernel that no GPU has run is known to compile, in bf16
too, to fit in shared memory, and to keep its numbers in registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from diptych.kernels.gpu import attend_chunks, attend_singles, draw, edges, gated, move_rows, residual_norm, rotary_store, tiles
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

BLOCK = 16
SHAPES = [(8, 4, 128), (4, 7, 64), (1, 4, 256)]
"""KV heads, query heads that share one, head_dim: an 8B Llama, a small Qwen2, Gemma 3 270M."""
DTYPES = [torch.bfloat16, torch.float32]


class NoDriver:
    """Stands for the driver: it knows what to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def launches(dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every kernel, as an engine would launch it for these shapes."""
    numbers = torch.zeros(9, dtype=torch.int64)
    row = torch.zeros(2, 4096, dtype=dtype)
    weight = torch.zeros(4096)
    for normed in (None, weight):
        yield (
            f"residual_norm {normed is not None}",
            lambda normed=normed: residual_norm.residual_norm(row, row, row, row, normed, weight, 1e-6),
        )
    for silu in (True, False):
        yield f"gated {silu}", lambda silu=silu: gated.gated(row, torch.zeros(2, 8192, dtype=dtype), silu)
    yield "move_rows", lambda: move_rows.move_rows(torch.zeros((), dtype=torch.int8), row, row.half(), numbers, numbers, True)
    logits, some = torch.zeros(2, 128_256, dtype=dtype), torch.zeros(2)
    for limits in ((None, None), (some, numbers)):
        yield f"draw {limits[0] is not None}", lambda limits=limits: draw.draw(numbers, logits, numbers, *limits)
    yield "edges", lambda: edges.edges(logits, numbers, True, True, True)
    for kv_heads, group, head_dim in shapes:
        heads = kv_heads * group
        cache = torch.zeros(64, kv_heads, 2, BLOCK, head_dim, dtype=dtype)
        query = torch.zeros(4, heads, head_dim, dtype=dtype)
        qkv, angle = torch.zeros(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype), torch.zeros(4, 1, head_dim // 2)
        norm, name = torch.zeros(heads + kv_heads, head_dim), f"{kv_heads}x{group}x{head_dim}"
        yield f"rotary_store {name}", lambda a=(query, cache, qkv, numbers, norm, (angle, angle), 1e-6): rotary_store.rotary_store(*a)
        for window, softcap, width in ((0, 0.0, 640), (512, 30.0, 4)):
            tables = torch.zeros(4, width, dtype=torch.int64)
            single = (query, query, cache, numbers, tables, numbers, numbers, 0.1, softcap)
            chunk = (query, query, cache, numbers, numbers, numbers, tables, 4, window, 0.1, softcap)
            yield f"attend_singles {name} {window}", lambda a=single: attend_singles.attend_singles(*a)
            yield f"attend_chunks {name} {window}", lambda a=chunk: attend_chunks.attend_chunks(*a)


def resources(ptx: str, capability: int) -> dict[str, int]:
    """What the assembler says: registers of a thread, and bytes that did not fit into them."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}", str(source), "-o", f"{scratch}/kernel"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stderr
    spilled = [int(each) for each in re.findall(r"(\d+) bytes spill", said)]
    return {"registers": max(int(each) for each in re.findall(r"Used (\d+) registers", said)), "spilled": sum(spilled)}


def compiled(capability: int, dtypes: list[torch.dtype], shapes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Each kernel that is launched: name, dtype, bytes of shared memory, warps, registers, bytes spilled, and how many copies to shared
    memory may be under way while it goes on."""
    found: list[dict[str, Any]] = []
    triton.runtime.driver.set_active(NoDriver(capability))
    generation = tiles.GENERATIONS.get(divmod(capability, 10), tiles.SMALL)
    for module in (attend_singles, attend_chunks):
        module.gpu = lambda _: tiles.Gpu(generation, 132)
    run = JITFunction.run
    launched: list[Any] = []
    JITFunction.run = lambda self, *args, **options: launched.append(run(self, *args, **{**options, "warmup": True}))
    for dtype in dtypes:
        for name, launch in launches(dtype, shapes):
            launched.clear()
            launch()
            for kernel in launched:
                taken = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps, **resources(kernel.asm["ptx"], capability)}
                ahead = max(map(int, re.findall(r"async_wait\b[^\n]*num = (\d+)", kernel.asm["ttgir"])), default=0)
                found.append({"kernel": name, "part": kernel.metadata.name, "dtype": str(dtype), "ahead": ahead, **taken})
    return found


if __name__ == "__main__":
    some = sys.argv[2:] == ["--few"]
    print(json.dumps(compiled(int(sys.argv[1]), DTYPES[: 1 if some else 2], SHAPES[: 1 if some else 3])))
