"""What the router must not pull in: it starts in a second and runs where there is no torch."""

import subprocess
import sys

import pytest

PROGRAM = "import sys, importlib; importlib.import_module(sys.argv[1]); print(*sys.modules)"


@pytest.mark.parametrize(("module", "forbidden"), [
    ("diptych.router.server", {"torch", "ray", "prometheus_client", "transformers", "numpy", "typer"}),
    ("diptych.router.machine", {"torch", "ray", "grpc", "asyncio", "starlette", "tokenizers"}),
    ("diptych.router.placement", {"torch", "ray", "grpc", "asyncio", "starlette", "tokenizers"}),
    ("diptych.router.budget", {"torch", "ray", "grpc", "asyncio", "starlette", "tokenizers"}),
])  # fmt: skip
def test_a_fresh_interpreter_does_not_import(module, forbidden):
    run = subprocess.run([sys.executable, "-P", "-c", PROGRAM, module], capture_output=True, text=True, timeout=60, check=True)
    assert not forbidden & set(run.stdout.split())
