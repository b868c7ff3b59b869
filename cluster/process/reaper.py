"""The reaper: a small process that outlives the supervisor by a moment and cleans up behind it.

    python -m diptych.cluster.process.reaper CLUSTER_ID STATE_FILE SCRATCH_DIRECTORY

It waits on its stdin, which only the supervisor holds open. A line `done` there means the supervisor has cleaned up itself. The end
of the pipe without it means the supervisor was killed: then the reaper ends every process of the cluster, and removes its scratch
directory (Ray's sockets and session files lie there) and its state file. Without it a SIGKILLed supervisor leaves two of Ray's
agents running and the session directory on disk (measured with Ray 2.60).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from .processes import sweep


def main() -> int:
    cluster_id, state_file, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when its supervisor does, not before
    said = b""
    while data := os.read(0, 64):
        said += data
    if said.strip() != b"done":
        sweep(cluster_id, (scratch,))
        state_file.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
