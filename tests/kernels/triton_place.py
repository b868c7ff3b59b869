"""Where the Triton kernels are tested: on a GPU where there is one, else in Triton's interpreter, and there not in bf16, whose products it
gets wrong.

The interpreter is chosen when triton, and when a kernel, is imported; nothing else of the tests imports them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from diptych.kernels import triton_kernels

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
ROUNDING = {torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Between two numbers next to each other, at most, as a share of them; of fp32 32 of them, since sums have another order."""

if not ON_GPU and find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        triton_kernels.triton_kernels()
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops compute with Triton, and every `torch.empty` is NaN."""
    if triton_kernels.triton_kernels() is None:
        pytest.skip("triton is not installed")
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
