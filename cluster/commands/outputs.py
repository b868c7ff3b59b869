"""Files that a command will write: what would go wrong is said before anything long is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.errors import ConfigError

PICTURES = (".png", ".pdf", ".svg")


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path | None]) -> None:
    """`outputs`: by option. `ConfigError` names the option of one that cannot be written, or that would overwrite an input."""
    for option, out in outputs.items():
        if out is None:
            continue
        key = option.lstrip("-")
        if out.is_dir():
            raise ConfigError(f"{option}: {out} cannot be written: it is a directory.", field=key)
        if not out.absolute().parent.is_dir():
            raise ConfigError(f"{option}: {out} cannot be written: there is no directory {out.parent}.", field=key)
        if not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
            raise ConfigError(f"{option}: {out} cannot be written: no permission.", field=key)
        if out.exists() and any(each is not None and each.exists() and out.samefile(each) for each in inputs):
            raise ConfigError(f"{option}: {out} is read too and would be overwritten; name another file.", field=key)


def check_picture(option: str, out: Path | None) -> None:
    """`ConfigError` unless it ends as a picture does that can be drawn."""
    if out is not None and out.suffix.lower() not in PICTURES:
        raise ConfigError(f"{option}: {out} ends with none of {', '.join(PICTURES)}.", field=option.lstrip("-"))
