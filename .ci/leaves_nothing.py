"""Run a command; fail if a process it started, at any depth, is still there afterwards. Says nothing when all is well.

    python .ci/leaves_nothing.py COMMAND [ARGUMENT ...]

Every descendant inherits a random tag in its environment, daemons too, so none is missed and none of anybody else's is hit.
Processes get `GRACE_S` to end by themselves; what is left is listed and killed.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

TAG = "DIPTYCH_GATE"
GRACE_S = 5.0


def tagged(tag: str) -> dict[int, str]:
    """Living processes whose environment carries the tag, as pid → command line."""
    found: dict[int, str] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it ended, or is not ours to read
            continue
        if f"{TAG}={tag}".encode() in environment:
            found[int(process.name)] = command
    return found


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


def main(command: list[str]) -> int:
    tag = secrets.token_hex(8)
    status = subprocess.run(command, env={**os.environ, TAG: tag}, check=False).returncode
    if left := tagged(tag):
        wait_for_ends(list(left), GRACE_S)
    left = tagged(tag)
    for pid, line in sorted(left.items()):
        print(f"left behind: {pid} {line}", file=sys.stderr)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if left:
        print(f"{len(left)} processes were left behind and have been killed", file=sys.stderr)
    return status or int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
