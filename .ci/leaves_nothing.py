"""Run a command; fail if a process it started, at any depth, is still there afterwards. Says nothing when all is well.

    python .ci/leaves_nothing.py COMMAND [ARGUMENT ...]

This process is made the reaper of its descendants (prctl PR_SET_CHILD_SUBREAPER): a daemon whose parents have ended becomes its child, so
none is missed and none of anybody else's is hit. Processes get `GRACE_S` to end by themselves; what is left is listed and killed. A
SIGTERM, SIGINT or SIGHUP ends the command and all of its descendants.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0


def descendants() -> dict[int, str]:
    """Living processes below this one, as pid → command line. Zombies are reaped or somebody else's to reap."""
    parents: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if state not in "ZX":
            parents[int(process.name)] = int(parent)
    return {pid: command_line(pid) for pid in parents if is_below(pid, parents)}


def is_below(pid: int, parents: dict[int, int]) -> bool:
    while (pid := parents.get(pid, 0)) != 0:
        if pid == os.getpid():
            return True
    return False


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:  # it has ended
        return ""


def wait_for_ends(pids: list[int], seconds: float) -> None:
    """Return when all of `pids` have ended, or after `seconds`."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
        finally:
            os.close(handle)


def kill_all() -> None:
    """Kill every descendant, those that are forked meanwhile too."""
    while left := descendants():
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        wait_for_ends(list(left), GRACE_S)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Nobody waits for the command any more."""
    kill_all()
    sys.exit(128 + number)


def main(command: list[str]) -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    status = subprocess.run(command, check=False).returncode
    wait_for_ends(list(descendants()), GRACE_S)
    left = descendants()
    for pid, line in sorted(left.items()):
        print(f"left behind: {pid} {line}", file=sys.stderr)
    kill_all()
    if left:
        print(f"{len(left)} processes were left behind and have been killed", file=sys.stderr)
    return status or int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
