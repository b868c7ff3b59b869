"""What the doctor is shown: a config, and programs that say what those of a wrong host would."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from cluster_harness import write_card
from diptych.cluster.doctor import examining
from diptych.cluster.doctor.finding import Finding
from diptych.core.config import ClusterConfig, load_config


def fake_program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def config(tmp_path: Path, **sections: Any) -> ClusterConfig:
    model = tmp_path / "model"
    if not model.exists():
        (write_card(model) / "tokenizer.json").write_text("{}")
    base: dict[str, Any] = {"model": {"source": str(model)}, "router": {"http_port": 0, "grpc_port": 0}, "ray": {"enabled": False}}
    return load_config({**base, **sections})


def examined(config: ClusterConfig) -> dict[str, Finding]:
    return {finding.check: finding for finding in examining.examine(config, None)}
