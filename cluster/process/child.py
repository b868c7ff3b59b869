"""What every process started by a supervisor does: tell its story on stdout, one JSON object a line, and end when it must.

Standard library only, so that a child says its first word before anything heavy is imported.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ...core.config import LogFormat
from .logs import formatter

PR_SET_PDEATHSIG = 1
FAILED = 2
"""Exit status of a child that could not start and has said why."""
UNLEASHED = 3
"""Exit status of a child whose parent has gone."""
DIED = 70
"""Exit status of a rank whose books or engine could no longer be trusted, or that lost another rank of its worker (EX_SOFTWARE)."""


def say(event: str, **values: object) -> None:
    """Write one event to stdout. A parent that no longer reads is a parent that is gone: the leash deals with it."""
    try:
        sys.stdout.write(json.dumps({"event": event, **values}, default=str) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        logging.getLogger(__name__).warning("Nobody reads this process's stdout any more.")


def claim_stdout() -> None:
    """Keep stdout for `say`: what libraries print (gloo does) goes to the log."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def seconds_alive() -> float:
    """Seconds since this process started, the interpreter's own start included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def progress(what: str) -> None:
    """Say that `what` is done, and how old the process is."""
    say("progress", what=what, seconds=round(seconds_alive(), 3))


class Leash:
    """Stdin: while its other end is open this process may live. What comes on it are orders, one a line; `obey` is called with each, on a
    thread of the leash's own."""

    def __init__(self) -> None:
        self.obey: Callable[[str], None] = _nobody_obeys

    def watch(self) -> None:
        unread = b""
        while chunk := os.read(0, 4096):
            *lines, unread = (unread + chunk).split(b"\n")
            for line in lines:
                self.obey(line.decode())
        sys.stderr.write("The process that started this one has gone; ending.\n")
        sys.stderr.flush()
        os._exit(UNLEASHED)


def _nobody_obeys(order: str) -> None:
    logging.getLogger(__name__).warning("An order came that this process does not carry out: %.200s", order)


def hold_leash() -> Leash:
    """End this process when its parent does: at the end of stdin, and by SIGKILL for a stopped one that cannot read.

    The kernel's death signal follows the parent's *thread*: start children from a thread that stays.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    leash = Leash()
    threading.Thread(target=leash.watch, name="leash", daemon=True).start()
    return leash


def died(error: BaseException) -> None:
    """End the process at once and say why: whoever is connected to it sees that, and takes its work elsewhere."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(DIED)


def log_to_stderr(level: str, name: str, form: LogFormat = "pretty") -> None:
    """Log lines of the process called `name` on stderr; at debug level, our own only. Called again where a process takes another name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form, name))
    logging.basicConfig(handlers=[handler], level=max(logging.INFO, _number(level)), force=True)
    logging.getLogger("diptych").setLevel(_number(level))


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
