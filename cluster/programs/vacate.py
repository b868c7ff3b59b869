"""Have the workers that are led from this host finish what they have: what a host, or a pod, does before it goes away.

    python -m diptych.cluster.programs.vacate [--within SECONDS]

It asks each rank that leads a worker to drain (SIGTERM; it takes nothing new and finishes what it has) and waits for its end. The
supervisor notices, and starts the worker again, elsewhere once this host has gone. A worker whose leader is on another host is left alone:
it ends with its ranks here, and the router takes its requests elsewhere. Exit status 1 if one has not ended in time.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

WITHIN_S = 60.0
RANK = b"diptych.cluster.programs.rank"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diptych.cluster.programs.vacate", description="Drain the workers led from this host.")
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="SECONDS", help="how long that may take (default: 60)")
    left = vacate(parser.parse_args().within)
    if left:
        print(f"{left} workers have not ended", file=sys.stderr)
    return 1 if left else 0


def vacate(within_s: float) -> int:
    """Drain the leaders here; how many have not ended within so many seconds."""
    end = time.monotonic() + within_s
    with ExitStack() as stack:
        handles = []
        for pid in _leaders():
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:  # it has ended
                continue
            stack.callback(os.close, handle)
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            handles.append(handle)
        print(f"draining {len(handles)} workers", flush=True)
        while handles and (left := end - time.monotonic()) > 0:
            ended, _, _ = select.select(handles, [], [], left)
            handles = [handle for handle in handles if handle not in ended]
        return len(handles)


def _leaders() -> Iterator[int]:
    """Processes of this host that lead a worker; a follower has a `--leader`."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has ended, or may not be looked at
            continue
        if RANK in words and b"--leader" not in words:
            yield int(entry.name)


if __name__ == "__main__":
    sys.exit(main())
