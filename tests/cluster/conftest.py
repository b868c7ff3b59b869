"""A cluster of fake programs to start, and the files that tell them what to do wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import Cluster, Start, running, write_card

HERE = Path(__file__).parent


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    """Files here tell the fake programs what to do wrong; they write their pids and the fleets here."""
    (tmp_path / "orders").mkdir()
    return tmp_path / "orders"


@pytest.fixture
def start(tmp_path: Path, orders: Path) -> Start:
    model = write_card(tmp_path / "model")

    def start(**config: Any) -> AbstractContextManager[Cluster]:
        whole = {
            "model": {"source": str(model)},
            "router": {"http_port": 0, "grpc_port": 0},
            "ray": {"enabled": False},
            "prefill": {"kv_tokens": 256},
            "decode": {"kv_tokens": 256},
            **config,
        }
        environment = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "FAKES": str(orders)}
        return running([str(HERE / "fake_up.py"), json.dumps(whole)], environment)

    return start


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Short: a path to a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="diptych-") as directory:
        yield Path(directory)
