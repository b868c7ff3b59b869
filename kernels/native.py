"""The kernels in C++: compiled once for this machine's processor, kept, loaded.

They are generic C++ in GCC's and clang's vector types. Where AVX512-BF16 is there and fast, products use it. The library takes threads
from the OpenMP runtime that torch has loaded, so the two share one pool. Without a compiler every op computes with torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .threads import threads

log = logging.getLogger(__name__)

SOURCES = (
    "linear", "linear_many", "quantized", "residual_norm", "rotary_store", "gated", "int8_rows", "attend_singles",
    "attend_chunks", "argmax", "copy_runs", "draw", "likeliest", "bind",
)  # fmt: skip
HEADERS = ("vectors.h", "products.h", "int8_rows.h")
FP32_PRODUCTS = "-DDIPTYCH_FP32_PRODUCTS"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
COMPILE_S = 120.0
"""Longest a compiler may take, in seconds; it takes 3 where it has a core."""

Kernel = Callable[..., None]
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded kernels; arguments as in the C++ files, tensors as `data_ptr()`.

    Products, `dequantize`, `attend_singles`, `attend_chunks`, `copy_runs` and `copy_summed` let other Python threads run meanwhile. The
    others take microseconds, less than it takes to get the interpreter back from a thread that has it; so do `copy_few` and
    `copy_summed_few`, the same for few bytes.
    """

    linear: Kernel
    linear_many: Kernel | None
    """Where oneDNN has no faster product of many rows of bf16."""
    linear_quantized: Kernel
    dequantize: Kernel
    residual_norm: Kernel
    rotary_store: Kernel
    gated: Kernel
    attend_singles: Kernel
    attend_chunks: Kernel
    read_int8: Kernel
    argmax: Kernel
    copy_runs: Kernel
    copy_few: Kernel
    copy_summed: Kernel
    copy_summed_few: Kernel
    draw: Kernel
    likeliest: Kernel
    log_totals: Kernel
    bind: Kernel


@cache
def native() -> Native | None:
    """The kernels, compiled if this machine has not done so yet; None where that is not possible, after a warning that says why."""
    try:
        path = build(kernels_dir())
        return _load(path)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        log.warning("No C++ kernels, all is computed with torch, and a bf16 decode step takes about twice as long: %s", _reason(error))
        return None


def native_for(x: Tensor) -> Native | None:
    """The kernels, if they can compute with `x`: bf16, in this host's memory."""
    return native() if x.dtype is torch.bfloat16 and x.is_cpu else None


def threads_for(elements: int) -> int:
    """Threads for an op that does little with each of `elements`: below 64 Ki waking another takes longer than it saves."""
    return 1 if elements < 1 << 16 else threads()


def kernels_dir() -> Path:
    """$DIPTYCH_HOME/kernels, by default ~/.cache/diptych/kernels."""
    return Path(os.environ.get("DIPTYCH_HOME") or Path.home() / ".cache" / "diptych") / "kernels"


def build(directory: Path) -> Path:
    """The library for this processor, sources and compiler, below `directory`; compiled if it is not there.

    Of processes that ask at once one compiles and the others wait. `RuntimeError` or `SubprocessError` says what is lacking.
    """
    compiler = _compiler()
    library = directory / _key(compiler) / "kernels.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    """All sources as one: the compiler reads the headers once. It appears under its name when it is whole."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        unit, compiled, linked = (Path(scratch) / name for name in ("all.cpp", "all.o", "all.so"))
        unit.write_text("".join(f'#include "{here / name}.cpp"\n' for name in SOURCES))
        _run(compiler, *_flags(), "-c", str(unit), "-o", str(compiled))
        # Linked without -fopenmp: its symbols are then those of the runtime that torch has, not of a second one with its own threads.
        _run(compiler, "-shared", str(compiled), "-o", str(linked))
        linked.rename(library)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if path := shutil.which(name):
            return os.path.realpath(path)
    raise RuntimeError(f"no C++ compiler ({named or ', '.join(COMPILERS)}) was found")


def _key(compiler: str) -> str:
    """Everything the library depends on: sources, flags, compiler, processor."""
    here, stat = Path(__file__).parent, os.stat(compiler)
    parts = [(here / file).read_bytes() for file in (*HEADERS, *(f"{name}.cpp" for name in SOURCES))]
    parts += [repr((_flags(), compiler, stat.st_size, stat.st_mtime_ns, platform.machine(), _processor())).encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    """`FLAGS`, and in what products are computed."""
    return (*FLAGS, FP32_PRODUCTS) if fp32_products(_processor()) else FLAGS


def _processor() -> list[str]:
    """Model and instructions of the first processor, as the kernel names them."""
    names = ("vendor_id", "cpu family", "model\t", "flags", "CPU part", "Features")
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return [line for line in first.splitlines() if line.startswith(names)]


def fp32_products(processor: Sequence[str]) -> bool:
    """Whether it multiplies in fp32 at least as fast as in bf16. Intel's AVX512-BF16 multiplies 32 pairs in two cycles, in which the units
    for fp32 do 64 (a Xeon: 89 and 178 GFLOP/s a core); on AMD's bf16 is the faster one. `processor`: as `_processor` gives it."""
    return "AuthenticAMD" not in " ".join(processor) or not _has(processor, "avx512_bf16")


def many_in_fp32(processor: Sequence[str]) -> bool:
    """Whether linear_many.cpp is faster than oneDNN: where that has neither fast bf16 products nor AMX. Only x86 was measured."""
    return _has(processor, "avx2") and fp32_products(processor) and not _has(processor, "amx_bf16")


def _has(processor: Sequence[str], instructions: str) -> bool:
    return any(instructions in line.split() for line in processor if line.startswith("flags"))


def _load(path: Path) -> Native:
    # torch's OpenMP runtime: already loaded, here only made visible to the library.
    if (openmp := Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists():
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    alone, together = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
    return Native(
        linear=_kernel(together.diptych_linear, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I),
        linear_many=_kernel(together.diptych_linear_many, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I) if many_in_fp32(_processor()) else None,
        linear_quantized=_kernel(together.diptych_linear_quantized, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I),
        dequantize=_kernel(together.diptych_dequantize, _P, _P, _P, _P, _I, _I, _I, _I),
        residual_norm=_kernel(alone.diptych_residual_norm, _P, _P, _P, _P, _P, _P, _I, _I, _F, _I),
        rotary_store=_kernel(alone.diptych_rotary_store, _P, _P, _P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _F, _I, _I),
        gated=_kernel(alone.diptych_gated, _P, _P, _I, _I, _I, _I),
        attend_singles=_kernel(together.diptych_attend_singles, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _F, _I, _I),
        attend_chunks=_kernel(together.diptych_attend_chunks, *[_P] * 7, *[_I] * 7, _F, _F, _I, _I),
        read_int8=_kernel(alone.diptych_read_int8, _P, _P, _P, _I, _I, _I, _I),
        argmax=_kernel(alone.diptych_argmax, _P, _P, _I, _I, _I),
        copy_runs=_kernel(together.diptych_copy_runs, _P, _I, _I),
        copy_few=_kernel(alone.diptych_copy_runs, _P, _I, _I),
        copy_summed=_kernel(together.diptych_copy_summed, _P, _I, _P, _I, _I, _P, _I, _P),
        copy_summed_few=_kernel(alone.diptych_copy_summed, _P, _I, _P, _I, _I, _P, _I, _P),
        likeliest=_kernel(alone.diptych_likeliest, _P, _P, _P, _P, _I, _I, _I, _P, _P, _I, _I, _I),
        log_totals=_kernel(alone.diptych_log_totals, _P, _P, _I, _I, _I, _P, _P, _I, _I),
        bind=_kernel(together.diptych_bind, _P, _I),
        draw=_kernel(alone.diptych_draw, _P, _P, _I, _I, _I, _P, _P, _P, _I, _I),
    )


def _kernel(function: ctypes._NamedFuncPointer, *arguments: type) -> Kernel:
    function.argtypes, function.restype = arguments, None
    return function


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = [line for line in error.stderr.splitlines() if "error" in line]
        return f"{error.cmd[0]} failed: {(said or ['it said nothing'])[0]}"
    return str(error)
