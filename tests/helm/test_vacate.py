"""What preStop of a worker's pod does: leaders are drained, and nobody else is touched. In a process namespace of its own: it looks at
every process there is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hosts import missing

SCRIPT = """
import subprocess, sys
from diptych.cluster.programs.vacate import vacate

def start(code, *words):
    code = f"import signal\\n{code}\\nprint('up', flush=True)\\nsignal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\\n"
    return process

leader = start("", "diptych.cluster.programs.rank", "--spec", "{}")
follower = start("", "diptych.cluster.programs.rank", "--spec", "{}", "--leader", "10.0.0.1:5")
other = start("", "diptych.cluster.programs.route")
assert vacate(60) == 0
assert leader.wait() == -15
assert follower.poll() is None and other.poll() is None
start("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "diptych.cluster.programs.rank")
assert vacate(0.2) == 1, "one that does not end is said"
"""


@pytest.mark.root
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_leaders_end_and_nobody_else() -> None:
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    done = subprocess.run([*alone, sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "draining 1 workers\ndraining 1 workers\n"
