"""The requests of the recent past, for whoever plans by them: in memory and bounded, and in a file if one was asked for."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TextIO

from ..core.clock import Clock
from ..core.errors import ConfigError
from ..core.workload import Recorded, Window

KEPT = 8192
"""Requests: five minutes at 27 a second. One takes 150 bytes."""
WRITE_S = 1.0
"""What a router that is killed has not written yet."""
COLUMNS = "arrival_s,prompt_tokens,output_tokens,prefix,prefix_tokens,ttft_s,tpot_s"
"""What `diptych simulate` reads, and the times. What was cached is a prefix, the same of all requests."""
log = logging.getLogger(__name__)


class Past(NamedTuple):
    """As `Recorded`, but for `accepted`, seconds on the router's clock."""

    accepted: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: float | None
    tpot: float | None


class Recording:
    """`running` are asked for when a window is: a queue that grows is not seen in what has ended."""

    def __init__(self, clock: Clock, kept: int = KEPT) -> None:
        self._clock = clock
        self._ended: deque[Past] = deque(maxlen=kept)
        self._whole_since = clock.now()
        """Of the requests that came since then none has been forgotten."""
        self._untaken: deque[Past] = deque(maxlen=kept)

    def ended(self, past: Past) -> None:
        """One more has ended. Nothing came of it: it is no load that was served."""
        if not past.output_tokens:
            return
        if len(self._ended) == self._ended.maxlen:
            self._whole_since = max(self._whole_since, self._ended[0].accepted)
        self._ended.append(past)
        self._untaken.append(past)

    def window(self, seconds: float, running: Iterable[Past]) -> Window:
        """Of the last `seconds`, or of so many as are remembered."""
        now = self._clock.now()
        since = max(now - seconds, self._whole_since)
        found = [
            Recorded(now - past.accepted, past.prompt_tokens, past.cached_tokens, past.output_tokens, past.ttft, past.tpot, ended)
            for pasts, ended in ((self._ended, True), (running, False))
            for past in pasts
            if past.accepted > since
        ]
        found.sort(key=itemgetter(0), reverse=True)
        return Window(now - since, tuple(found))

    def take(self) -> list[Past]:
        """What has ended since this was called last, to be written to a file."""
        taken = list(self._untaken)
        self._untaken.clear()
        return taken


class RecordFile:
    """CSV, a row for each request in the order in which they came, so it is written when all that came before it have ended.

    When the file is full it becomes FILE.1, in place of the one before. Times begin at 0 in each.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        """What is in the file already becomes FILE.1. `ConfigError` if it cannot be written."""
        self._path, self._most_bytes = path, most_bytes
        self._behind: list[Past] = []
        """They wait for one that came before."""
        self._begin: float | None = None
        self._last = 0.0
        self._bytes = 0
        try:
            if path.exists() and path.stat().st_size:
                self._turn()
            self._file = self._open()
        except OSError as error:
            raise ConfigError(f"router.record: {path} cannot be written: {error.strerror}.", field="router.record") from None

    def write(self, ended: Iterable[Past], oldest: float | None) -> None:
        """`oldest`: when the first of those came that have not ended; None: there are none. Raises `OSError`."""
        self._behind += ended
        self._behind.sort(key=lambda past: past.accepted)
        everything = oldest is None or len(self._behind) > KEPT
        ready = [past for past in self._behind if everything or past.accepted < (oldest or 0.0)]
        self._behind = self._behind[len(ready) :]
        for past in ready:
            self._row(past)
        self._file.flush()

    def _row(self, past: Past) -> None:
        if self._bytes > self._most_bytes:
            self._file.close()
            self._turn()
            self._file = self._open()
        if self._begin is None:
            self._begin = past.accepted
        # One that took long to tokenise, or for which too many waited, may come behind those that came after it.
        self._last = at = max(self._last, past.accepted - self._begin)
        times = ("" if seconds is None else f"{seconds:.5f}" for seconds in (past.ttft, past.tpot))
        cells = (f"{at:.4f}", past.prompt_tokens, past.output_tokens, min(1, past.cached_tokens), past.cached_tokens, *times)
        self._bytes += self._file.write(",".join(map(str, cells)) + "\n")

    def _turn(self) -> None:
        os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        self._begin, self._last = None, 0.0

    def _open(self) -> TextIO:
        file = self._path.open("a", encoding="utf-8")
        self._bytes = file.write(COLUMNS + "\n")
        return file

    def close(self) -> None:
        self._file.close()


async def keep_written(recording: Recording, file: RecordFile, oldest: Callable[[], float | None]) -> None:
    """Write what has ended to the file once a second, on a thread, and the rest when cancelled. `oldest` as for `RecordFile.write`.

    The thread has nothing else to do, and what it was given it writes, whoever is cancelled: the file is closed behind it.
    """
    loop = asyncio.get_running_loop()
    with closing(file), ThreadPoolExecutor(1, "record") as thread:
        try:
            while True:
                await asyncio.sleep(WRITE_S)
                if ended := recording.take():
                    await asyncio.shield(loop.run_in_executor(thread, _write, file, ended, oldest()))
        finally:
            thread.submit(_write, file, recording.take(), None)


def _write(file: RecordFile, ended: Iterable[Past], oldest: float | None) -> None:
    try:
        file.write(ended, oldest)
    except OSError as error:
        log.error("router.record: requests were not recorded: %s", error)
