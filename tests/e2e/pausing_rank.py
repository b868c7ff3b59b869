"""A rank that stops itself at a chosen point of its life: `python pausing_rank.py DIRECTORY --spec … --leash`.

Lay down DIRECTORY/<point> with a number in it: the first rank of those with this directory that has passed the point so often claims
the file and sends itself SIGSTOP there, before it does what comes next. Nothing of it is in what we ship: it wraps methods from outside.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.cluster.programs import rank
from diptych.core.transfer import Ack, Commit, Ready
from diptych.decode_worker.role import DecodeRole
from diptych.kv_transfer import source_machine
from diptych.kv_transfer.destination_machine import DestinationMachine
from diptych.kv_transfer.source_machine import SourceMachine

source_machine.WORTH_BYTES = 1  # so that a short prompt of a small model is announced layer by layer
POINTS: dict[str, tuple[type, str, type | None]] = {
    "offer": (SourceMachine, "offer", None),
    "announce": (SourceMachine, "announce", None),
    "ack": (SourceMachine, "received", Ack),
    "grant": (DestinationMachine, "grant", None),
    "ready": (DestinationMachine, "received", Ready),
    "commit": (DestinationMachine, "received", Commit),
    "step": (DecodeRole, "complete", None),
}
"""Name → the method at whose door the rank stops, and what must be among its arguments. P stops at the first three, D at the others."""


class Point:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed = 0

    def reached(self) -> None:
        if not self._path.exists():
            return
        self._passed += 1
        try:
            if self._passed <= int(self._path.read_text()):
                return
            self._path.unlink()
        except FileNotFoundError:  # another rank was faster
            return
        self._passed = 0
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # to this thread: a signal to the process would let it run on a little


def stop_at(point: Point, owner: type, method: str, argument: type | None) -> None:
    whole: Callable[..., Any] = getattr(owner, method)

    def stopping(*arguments: Any) -> Any:
        if argument is None or any(isinstance(value, argument) for value in arguments):
            point.reached()
        return whole(*arguments)

    setattr(owner, method, stopping)


def main() -> int:
    directory = Path(sys.argv.pop(1))
    for name, (owner, method, argument) in POINTS.items():
        stop_at(Point(directory / name), owner, method, argument)
    return rank.main()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
