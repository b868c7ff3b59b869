"""What the threads of this process have taken of the cores, as Linux counts it."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from .recordings import ThreadTime

_TASKS = Path("/proc/self/task")


def thread_times() -> tuple[ThreadTime, ...]:
    """Of every thread, Python's and others', since each began."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = []
    for task in sorted(_TASKS.iterdir(), key=lambda task: int(task.name)):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            ran, ready, _ = (task / "schedstat").read_text().split()
            number = int(task.name)
            found.append(ThreadTime(number, names.get(number) or (task / "comm").read_text().strip(), int(ran), int(ready)))
    return tuple(found)
