"""Logs: one line per event, one file per process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
TIME = "%Y-%m-%dT%H:%M:%S"
TAIL_BYTES = 1 << 16


@contextmanager
def logging_to(path: Path, level: str) -> Iterator[None]:
    """Send this process's log to `path`, and to it alone."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT, TIME))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)  # one that is only closed would open the file again for the next line
        handler.close()


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log that are not empty; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
