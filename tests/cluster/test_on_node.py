"""A rank on a node: it sees to the model there, takes the node's address and cores, and becomes the rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_harness import write_card
from diptych.cluster.process.spec import RankSpec
from diptych.cluster.programs.on_node import model_here
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.core.model import read_card
from diptych.core.quantization import Quantization

UNLEASHED = 3


@contextmanager
def on_node(model: Path, fingerprint: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    spec = RankSpec(worker_id="decode-0", phase=Phase.DECODE, model_dir=model, threads=8, kv_tokens=512)
    command = [sys.executable, "-m", "diptych.cluster.programs.on_node", "--spec", spec.model_dump_json(), "--source", "/nowhere/model"]
    here = [
        "--dtype",
        "float32",
        "--quantization",
        "none",
        "--fingerprint",
        fingerprint,
        "--host",
        "127.0.0.1",
        "--threads",
        "1",
        *options,
        "--leash",
    ]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [*command, *here], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd="/"
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def last_event(process: subprocess.Popen[str]) -> dict[str, object]:
    """The first that is no progress."""
    assert process.stdout is not None
    return next(event for event in map(json.loads, process.stdout) if event["event"] != "progress")


def test_it_becomes_the_rank_with_the_nodes_address_and_a_core_of_its_own(tiny_gemma3_dir: Path) -> None:
    with on_node(tiny_gemma3_dir, read_card(tiny_gemma3_dir).fingerprint, "--cores", "0:1") as process:
        ready = last_event(process)
        assert ready["event"] == "ready"
        assert str(ready["address"]).startswith("127.0.0.1:")
        assert os.sched_getaffinity(process.pid) == {min(os.sched_getaffinity(0))}
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == UNLEASHED, "the leash is still held"


def test_a_model_that_the_node_has_not_is_said_with_the_node(tiny_gemma3_dir: Path) -> None:
    with on_node(tiny_gemma3_dir / "elsewhere", "f" * 64) as process:
        failed = last_event(process)
        assert failed["event"] == "failed"
        assert failed["field"] == "model.source"
        assert "On node 127.0.0.1 the model cannot be had" in str(failed["message"])
        assert "/nowhere/model" in str(failed["message"])
        assert process.wait(20) == 2


def test_another_model_at_the_same_place_is_not_served(tmp_path: Path) -> None:
    here = write_card(tmp_path / "model")
    asked = (here, str(here), DType.FLOAT32, Quantization.NONE)
    assert model_here(*asked, "f" * 64, "10.0.0.2") == here
    with pytest.raises(ConfigError, match=r"On node 10.0.0.2 .* is another model than here"):
        model_here(*asked, "e" * 64, "10.0.0.2")
