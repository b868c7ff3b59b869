"""The file that `diptych simulate --json` writes: every request in the order in which they came, then the summary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...core.errors import ConfigError
from ..planner.life import Life


class RequestsFile:
    """Rows are written one by one in the order of their numbers, so that none is kept but those that ended before an earlier one."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file
        self._next = 0
        self._early: dict[int, str] = {}
        if file is not None:
            file.write('{\n "version": 1,\n "requests": [')

    def add(self, life: Life, met: bool) -> None:
        if self._file is None:
            return
        self._early[life.arrival.number] = json.dumps(row_of(life, met))
        while (row := self._early.pop(self._next, None)) is not None:
            self._file.write((",\n  " if self._next else "\n  ") + row)
            self._next += 1

    def end(self, summary: dict[str, Any]) -> None:
        """All requests have been added."""
        assert not self._early, "a request has not ended"
        if self._file is not None:
            self._file.write(f'\n ],\n "summary": {json.dumps(summary, indent=1)}\n}}\n')


@contextmanager
def requests_file(out: Path | None) -> Iterator[RequestsFile]:
    """None: nothing is written. `ConfigError` if it cannot be."""
    if out is None:
        yield RequestsFile(None)
        return
    try:
        file = out.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}.", field="json") from None
    with file:
        yield RequestsFile(file)


def row_of(life: Life, met: bool) -> dict[str, Any]:
    """A request as the file has it: seconds."""
    arrival = life.arrival
    return {
        "number": arrival.number,
        "arrival_s": round(arrival.at, 6),
        "prompt_tokens": arrival.prompt_tokens,
        "output_tokens": arrival.output_tokens,
        "ttft_s": _rounded(life.ttft),
        "tpot_s": _rounded(life.tpot),
        "ended_s": _rounded(life.last),
        "prefill": life.prefill,
        "decode": life.decode,
        "met": met,
        "refused": life.refused,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
