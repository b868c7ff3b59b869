"""Every parser of what strangers send, under atheris: a few seconds in the gate, five minutes in nightly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness.py")
FIVE_MINUTES = 300


def fuzz(target: str, corpus: Path, *options: str, timeout_s: float) -> str:
    """What libFuzzer says; fails with it, and with the bytes, if a parser did what it may not."""
    command = [sys.executable, str(HARNESS), target, str(corpus), *options]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    found = [path.read_bytes() for path in corpus.glob("crash-*")] + [path.read_bytes() for path in corpus.glob("timeout-*")]
    assert done.returncode == 0, f"{found}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stderr


@pytest.mark.timeout(300)  # 10 s alone
@pytest.mark.parametrize("target", ["codec", "bodies"])
def test_no_bytes_surprise_a_parser(target: str, tmp_path: Path) -> None:
    assert "Done 5000 runs" in fuzz(target, tmp_path, "-runs=5000", "-seed=1", timeout_s=280)


@pytest.mark.nightly
@pytest.mark.timeout(FIVE_MINUTES + 120)
@pytest.mark.parametrize("target", ["codec", "bodies"])
def test_five_minutes_of_bytes_surprise_no_parser(target: str, tmp_path: Path) -> None:
    assert "Done " in fuzz(target, tmp_path, f"-max_total_time={FIVE_MINUTES}", timeout_s=FIVE_MINUTES + 100)
