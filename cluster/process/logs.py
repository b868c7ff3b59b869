"""Logs: one line per event, one file per process; for people (`pretty`) or for programs (`json`)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...core.config import LogFormat
from ...core.notes import FIELDS

TAIL_BYTES = 1 << 16
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\x1b": "\\x1b"})
"""What would let a message begin a line of its own, or colour the terminal of whoever reads it."""


class Pretty(logging.Formatter):
    """`time LEVEL process logger: message key=value …`; a traceback follows its line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        head = f"{_when(record)} {record.levelname} {self._process} {record.name}"
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{head}: {record.getMessage().translate(_ESCAPES)}{fields}{trace}"


class Json(logging.Formatter):
    """One JSON object a line; a traceback is its `trace`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        fields = {name: value for name, value in _fields(record).items() if name not in line}
        return json.dumps({**line, **fields, **trace}, default=str, ensure_ascii=False)


def formatter(form: LogFormat, process: str) -> logging.Formatter:
    """Lines of this form that name `process`."""
    return Json(process) if form == "json" else Pretty(process)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return getattr(record, FIELDS, {})


def _when(record: logging.LogRecord) -> str:
    """UTC, so that the lines of several hosts sort."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _plain(value: object) -> str:
    """A value without spaces as it is, any other in quotes."""
    text = str(value).translate(_ESCAPES)
    return text if text and not any(c in text for c in ' "=') else json.dumps(text, ensure_ascii=False)


@contextmanager
def logging_to(path: Path, level: str, form: LogFormat = "pretty") -> Iterator[None]:
    """Send this process's log to `path`, and to it alone; its lines name it as the file does."""
    handler = logging.FileHandler(path)
    handler.setFormatter(formatter(form, path.stem))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)  # one that is only closed would open the file again for the next line
        handler.close()


def hand_on(log: Path, to: Path) -> None:
    """The process that writes to `log` goes on in `to`. What somebody before has written there is put aside, once."""
    with suppress(FileNotFoundError):
        to.rename(to.with_suffix(".earlier.log"))
    with suppress(FileNotFoundError):
        log.rename(to)


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log that are not empty; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
