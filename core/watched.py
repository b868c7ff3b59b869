"""Files that may be replaced while they are in use: read again when they change, and left as they were if they cannot be read any more."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from .errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

FAULTS = (OSError, ValueError, ConfigError)
"""What reading a file may raise."""


class Watched(Generic[T]):
    """`value` is what `read` made of the files when they could last be read. Used by any thread."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Raises what `read` does."""
        self._paths, self._read = paths, read
        self._seen = self._signatures()
        self._looking = threading.Lock()
        self.value = read()

    def refresh(self) -> bool:
        """Look, by a stat for each file (2 µs); whether `value` is another now. What is wrong is logged once."""
        with self._looking:
            found = self._signatures()
            if found == self._seen:
                return False
            self._seen = found
            try:
                self.value = self._read()
            except FAULTS as error:
                log.error("%s cannot be read any more (%s): what was read before stays good", self._named(), words(error))
                return False
        log.info("%s read again", self._named())
        return True

    def _signatures(self) -> list[tuple[int, int, int]]:
        return [_signature(path) for path in self._paths]

    def _named(self) -> str:
        return ", ".join(map(str, self._paths))


def _signature(path: Path) -> tuple[int, int, int]:
    """Changes whenever the file does; a link is followed, which is how Kubernetes replaces a mounted secret."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def words(error: Exception) -> str:
    """What is wrong with a file, without what is in it."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    said = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).rstrip(".")
