"""The kernels' own tests once more under NVIDIA's compute-sanitizer, on a GPU where that is installed.

    pytest -m gpu tests/kernels/test_sanitized.py -rs

Minutes each. Not run yet: no GPU could be had.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = {
    "memcheck": "reads and writes outside of what is allocated",
    "racecheck": "threads of a block that race in its shared memory",
    "synccheck": "barriers that not all threads reach",
}
FOUND = 86
"""What it is told to exit with where it finds something: none of pytest's."""
HERE = Path(__file__).parent


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def command(binary: str, tool: str) -> list[str]:
    tests = [sys.executable, "-m", "pytest", str(HERE), "-k", "triton and not compiles", "-q", "-x", "-p", "no:cacheprovider"]
    return [binary, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all", *tests]


@pytest.mark.gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    binary = sanitizer()
    if not torch.cuda.is_available() or binary is None:
        pytest.skip(f"not checked for {TOOLS[tool]}: " + ("no GPU" if binary else "compute-sanitizer is not installed"))
    # Every tensor is an allocation of its own, or one that is overrun ends in its neighbour, unseen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = subprocess.run(command(binary, tool), env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert ran.returncode == 0, f"{tool}, exit {ran.returncode}\n{ran.stdout[-6000:]}\n{ran.stderr[-2000:]}"
