"""Processes of one cluster on this host: finding them by the mark in their environment, and ending them.

Everything a cluster starts, and everything that starts in turn (Ray's daemons among them), inherits the variable `MARK`. So what
is left after a crash is found without a list that could be stale. Standard library only: the reaper imports this.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "DIPTYCH_CLUSTER"
"""Environment variable that holds the cluster's id."""

SWEEP_S = 10.0
"""Longest a sweep tries to end what it finds; a SIGKILLed process is gone in milliseconds unless the kernel is stuck."""


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; None if there is no such process (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """Whether the process that had `pid` at `started` (see `start_ticks`) still runs; another one with its number does not count."""
    return start_ticks(pid) == started


def marked(cluster_id: str) -> list[int]:
    """Process ids of the cluster `cluster_id` on this host, this process excepted."""
    wanted = f"{MARK}={cluster_id}".encode()
    return [pid for pid in _all_pids() if pid != os.getpid() and wanted in _environment(pid) and start_ticks(pid) is not None]


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or another user's
        return []


def kill(pid: int, cluster_id: str) -> None:
    """SIGKILL `pid` if it (still) is of `cluster_id`; a number reused meanwhile is left alone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if f"{MARK}={cluster_id}".encode() in _environment(pid):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def sweep(cluster_id: str, directories: tuple[Path, ...], *, spare: int | None = None) -> int:
    """Kill every process of `cluster_id` but `spare`, until none is found (one may have been forking), then remove `directories`.

    Returns how many processes were found. Raises `TimeoutError` if some cannot be ended within `SWEEP_S`.
    """
    found: set[int] = set()
    give_up = time.monotonic() + SWEEP_S
    while alive := [pid for pid in marked(cluster_id) if pid != spare]:
        if time.monotonic() > give_up:
            raise TimeoutError(f"processes {alive} do not end")
        for pid in alive:
            kill(pid, cluster_id)
        found.update(alive)
        time.sleep(0.01)  # the kernel takes a moment to end them; there is no event for another's children
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    return len(found)
