"""The C++ kernels as a library: compiled once, by one of those who ask, for any processor; without a compiler torch, and a word of it."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys

import pytest
import torch
from diptych.kernels import native as native_module
from diptych.kernels.linear import linear, linear_torch
from diptych.kernels.native import build, native


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked for the kernels yet, with an empty cache."""
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    native.cache_clear()
    yield tmp_path
    native.cache_clear()


@pytest.fixture
def compiler():
    try:
        return native_module._compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


ASK = """
import torch
from diptych.kernels.native import native
kernels = native()
out = torch.empty(3)
x, w = torch.ones(1, 8).bfloat16(), torch.ones(3, 8).bfloat16()
out = torch.full((1, 3), torch.nan).bfloat16()
kernels.linear(out.data_ptr(), x.data_ptr(), w.data_ptr(), None, 1, 8, 3, 8, 8, 2)
assert out.tolist() == [[8, 8, 8]], out
"""


@pytest.mark.timeout(300)  # the compiler may take as long as `COMPILE_S`, and torch is imported three times
def test_of_processes_that_ask_at_once_one_compiles(fresh, compiler, tmp_path):
    """The compiler is one that notes each time it is run."""
    counting = tmp_path / "counting"
    counting.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nexec {compiler} "$@"\n')
    counting.chmod(0o755)
    environment = {**native_module.os.environ, "CXX": str(counting), "PYTHONSAFEPATH": "1"}
    asking = [subprocess.Popen([sys.executable, "-c", ASK], env=environment) for _ in range(3)]
    assert [each.wait(280) for each in asking] == [0, 0, 0]
    assert (tmp_path / "runs").read_text().split() == ["run", "run"], "once to compile, once to link"
    assert sorted(path.name for path in fresh.glob("kernels/*/*")) == ["kernels.so", "lock"]


@pytest.mark.parametrize("compiler_", ["no-such-compiler", "false"])
def test_without_a_working_compiler_torch_computes_and_it_is_said(fresh, compiler_, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler_)
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(7, 40).bfloat16()
    with caplog.at_level(logging.WARNING):
        out = linear(x, weight)
        linear(x, weight)
    assert torch.equal(out, linear_torch(x, weight))
    (record,) = caplog.records
    assert compiler_ in record.getMessage()
    assert list(fresh.rglob("*.so")) == []


def test_other_sources_flags_or_processors_are_other_libraries(compiler, monkeypatch):
    keys = {native_module._key(compiler)}
    monkeypatch.setattr(native_module, "FLAGS", (*native_module.FLAGS, "-DOTHER"))
    keys.add(native_module._key(compiler))
    monkeypatch.setattr(native_module, "_processor", lambda: ["flags: other"])
    keys.add(native_module._key(compiler))
    for in_fp32 in (True, False):
        monkeypatch.setattr(native_module, "fp32_products", lambda processor, answer=in_fp32: answer)
        keys.add(native_module._key(compiler))
    monkeypatch.setattr(native_module, "SOURCES", native_module.SOURCES[1:])
    assert len(keys | {native_module._key(compiler)}) == 5


@pytest.mark.parametrize(
    ("vendor", "flags", "in_fp32", "many"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", False, False),
        ("AuthenticAMD", "avx2", True, True),
        ("GenuineIntel", "avx2 avx512f avx512_bf16", True, True),
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16", True, False),
        ("GenuineIntel", "sse4_2", True, False),
    ],
)
def test_which_products_are_taken(vendor, flags, in_fp32, many):
    processor = [f"vendor_id\t: {vendor}", f"flags\t\t: fpu {flags}"]
    assert (native_module.fp32_products(processor), native_module.many_in_fp32(processor)) == (in_fp32, many)


@pytest.mark.parametrize("flag", [(), (native_module.FP32_PRODUCTS,)])
def test_products_in_bf16_and_in_fp32(flag, compiler, monkeypatch, tmp_path):
    """Both, whichever this processor takes."""
    monkeypatch.setattr(native_module, "FLAGS", (*native_module.FLAGS, *flag))
    monkeypatch.setattr(native_module, "fp32_products", lambda processor: False)
    _linear_is_right(native_module._load(build(tmp_path)).linear)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86's")
@pytest.mark.parametrize("level", [pytest.param("x86-64-v2", marks=pytest.mark.nightly), "x86-64-v3"])
def test_processors_without_avx512(level, compiler, monkeypatch, tmp_path):
    """The same sources for SSE4 and for AVX2, which this processor can run."""
    flags = [f"-march={level}" if flag.startswith("-march") else flag for flag in native_module.FLAGS]
    monkeypatch.setattr(native_module, "FLAGS", tuple(flags))
    kernels = native_module._load(build(tmp_path))
    _linear_is_right(kernels.linear)
    if kernels.linear_many is not None:
        _linear_is_right(kernels.linear_many)


def _linear_is_right(kernel):
    x, weight = torch.randn(15, 90).bfloat16(), torch.randn(37, 90).bfloat16()
    out = torch.full((15, 37), torch.nan).bfloat16()
    kernel(out.data_ptr(), x.data_ptr(), weight.data_ptr(), None, 15, 90, 37, 90, 90, 1)
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-4)
