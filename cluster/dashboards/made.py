"""Files that are made from what code says: written, or with `--check` only compared."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def make(files: Mapping[Path, str], command: str, flags: Sequence[str]) -> int:
    """Write each file whose text is another; with the flag `--check` name it instead, and return 1. `command` makes them."""
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if "--check" in flags:
        for path in stale:
            print(f"{path} is not what the code says. Make it anew: {command}", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path])
        print(f"wrote {path}")
    return 0
